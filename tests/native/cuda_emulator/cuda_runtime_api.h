// The few types and functions of the CUDA runtime that the library uses on the host.
#pragma once

#include <cstddef>

#include "emulator.h"

enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };
using cudaStream_t = struct CUstream_st*;

inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorLaunchFailure"; }
inline const char* cudaGetErrorString(cudaError_t) { return "the emulator refused the launch"; }
