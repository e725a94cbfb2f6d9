// Which instruction set the CPU kernels use: detected once, capped by an environment variable.
#pragma once

#include <string>

namespace midstream {

enum class Isa : int { generic = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3, amx = 4 };

/// Widest instruction set that this processor and its operating system can run. The first call asks
/// Linux for the tile registers where the processor has them.
Isa detected_isa();

/// The instruction set in use: the detected one, at most MIDSTREAM_CPU_ISA (generic, avx2, avx512,
/// avx512bf16, amx). Throws std::invalid_argument when that variable names none of them.
Isa isa();

/// Replace the cap taken from the environment, for probes packed from now on. Throws
/// std::invalid_argument for an unknown name.
void set_isa_cap(const std::string& name);

const char* isa_name(Isa isa);

}  // namespace midstream
