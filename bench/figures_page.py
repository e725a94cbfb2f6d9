"""The README's tables, from docs/figures.json."""

from __future__ import annotations

from typing import Any

DEMO = "midstream demo --streams 500 --seed 0 --json"

ROWS = {
    "forecast_lead_ratio": "lead, share of the oracle's",
    "forecast_brier_ratio": "Brier score, ratio to the oracle's",
    "overhead_testbed_batch_1": "time per token, ratio, testbed model, batch 1",
    "overhead_testbed_batch_8": "the same, batch 8",
    "overhead_llama_batch_1": "the same, Llama of 134 M random parameters, batch 1",
    "overhead_llama_batch_8": "the same, batch 8",
    "hf_batching_tpot_ratio": "the same in transformers' continuous batching, 16 requests",
    "vllm_tpot_ratio_1": "the same in vLLM on the CPU, 1 stream",
    "vllm_tpot_ratio_16": "16 streams",
    "vllm_ttft_ratio": "time to first token in vLLM, ratio",
    "vllm_ttft_ratio_less_one_step": "the same less the step that a held token waits",
    "naive_tpot_ratio_1": "vLLM with eager hooks that copy activations, 1 stream",
    "naive_tpot_ratio_16": "16 streams",
    "cpu_step_vs_eager": "decode step on the CPU, times faster than eager PyTorch, worst N",
    "cpu_step_vs_compile": "the same, than torch.compile",
    "cpu_prefill_vs_read": "prefill score on the CPU, time over only reading the input",
    "cpu_amx_vs_avx512": "AMX, times faster than AVX-512",
    "cpu_call_us": "cost of a call on the CPU, microseconds",
    "gpu_decode_vs_empty": "decode in a CUDA graph, time over an empty kernel's",
    "gpu_prefill_vs_copy": "prefill, share of the copy bandwidth",
    "gpu_norm_score_vs_norm": "norm with 8 probes, time over the norm alone",
    "gpu_llm_step_ratio": "time per token of an 8 B Llama with CUDA graphs, ratio",
    "slot_bytes": "memory of a slot with the default bundle, bytes",
    "demo_seconds": "the whole demo, seconds",
    "toxic_token_auroc": "token AUROC on 690 real comments",
    "toxic_spans_char_f1": "character F1 on them, seven taps, full context",
    "toxic_spans_char_f1_k0": "the same, reading no token ahead",
    "toxic_spans_char_f1_k1": "1 token ahead",
    "toxic_spans_char_f1_k2": "2 tokens ahead",
    "toxic_spans_char_f1_k4": "4 tokens ahead",
    "toxic_spans_char_f1_k8": "8 tokens ahead",
    "xstest_over_refusal": "over-refusal on XSTest's safe look-alikes",
    "testbed_probe_auroc_vs_oracle": "token AUROC of the best trained probe, share of the oracle's",
    "testbed_forecast_auroc_vs_oracle": "the same for a violation within 24 tokens",
    "collect_and_train_minutes": "1 M tokens at 4 taps collected, every method trained, minutes",
    "collect_vs_forward": "collecting at 4 taps, time over the bare forward pass",
    "calibration_bound_broken_share": "200 calibrations that broke their bound, learn-then-test",
    "calibration_bound_broken_share_crc": "the same, conformal risk control's",
    "replay_seconds": "100,000 streams of 256 tokens judged at 50 thresholds, seconds",
    "em_error_slope": "error of the chain that EM recovers, slope over the number of streams",
    "forecast_brier_vs_oracle": "Brier score of its forecasts, ratio to the true chain's",
    "turn_gate_f1phi2_vs_oracle": "turn gate on the testbed, F1φ2, share of the oracle's",
    "r_judge_detection": "unsafe traces of R-Judge flagged before their last call",
    "r_judge_fpr": "safe ones flagged",
    "r_judge_lead_steps": "lead of the flag, steps",
    "action_gate_p99_us": "action gate, p99 over calls (best of five, CPU time), microseconds",
    "serve_p99_added_ms_200_streams": "what the service adds to a token, 200 streams, p99, ms",
    "serve_rss_slope_mb_per_min": "growth of its memory under that load, MB per minute",
    "proxy_added_ms": "what the proxy adds to a token, 50 streams, ms",
    "audit_lost_records_after_kill": "acknowledged audit records missing after kill -9",
    "ledger_updates_per_second": "turns written to SQLite, durably, per second",
}


def render(figures: dict[str, dict[str, Any]]) -> str:
    """Return the README's block of tables."""

    def value(name: str) -> Any:
        return figures[name]["value"]

    def percent(name: str) -> str:
        return f"{value(name):.1%}"

    titles = {
        "midstream": "**midstream**",
        "oracle": "Bayes oracle",
        "threshold": "single-token threshold, no chain",
        "ema": "EMA threshold, no chain",
    }
    lines = [
        f"`{DEMO}`: {value('demo_violating')} of {value('demo_streams')} responses violate when "
        "nobody watches.",
        "",
        "| detect (horizon 0) | violating tokens that left | missed | false halts | "
        "tokens seen, median |",
        "|---|--:|--:|--:|--:|",
    ]
    for who, title in titles.items():
        cells = (
            str(value(f"detect_{who}_leaked_tokens")),
            percent(f"detect_{who}_missed_rate"),
            percent(f"detect_{who}_false_halt_rate"),
            f"{value(f'detect_{who}_median_tokens_seen'):g}",
        )
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += [
        "",
        "| forecast, at the oracle's false-halt rate | false halts | lead in tokens, median | "
        "Brier score |",
        "|---|--:|--:|--:|",
    ]
    for who, title in titles.items():
        cells = (
            percent(f"forecast_{who}_false_halt_rate"),
            f"{value(f'forecast_{who}_lead_tokens_median'):g}",
            f"{value(f'forecast_{who}_brier'):.4f}",
        )
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += ["", "| figure | asked | measured | command |", "|---|--:|--:|---|"]
    for name, title in ROWS.items():
        if name in figures:
            entry = figures[name]
            shown = f"{entry['value']:.3f}" if isinstance(entry["value"], float) else entry["value"]
            command = entry["command"]
            link = f"[{command}]({command})" if command.endswith(".md") else f"`{command}`"
            lines.append(f"| {title} | {entry['asked'] or '–'} | {shown} | {link} |")
    first = next(iter(figures.values()))
    lines += ["", f"Measured on {first['machine']}, {first['date']}."]
    return "\n".join(lines)
