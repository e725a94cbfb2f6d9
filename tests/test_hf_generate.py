"""`generate` under an attachment: same-step halts, and not a bit of difference elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny_models
import torch
import toy
from toy import BAD, BOS, EOS, PAD
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    StoppingCriteria,
    TextStreamer,
)

from midstream.bank import Probe
from midstream.bundle import WrongModelError
from midstream.engines.hf.checks import UnsupportedGenerationError
from midstream.engines.hf.scoring import score
from midstream.evidence import Ema
from midstream.monitor import Monitor, MonitorInUseError
from midstream.policy import PolicyError, Thresholds
from midstream.taps import Tap

NEVER = {"moderate": Thresholds(horizon=0, halt_at=1.0)}


def prompts(*lengths: int) -> dict[str, torch.Tensor]:
    """Left-padded prompts without bad words."""
    width = max(lengths)
    gen = torch.Generator().manual_seed(sum(lengths))
    ids = torch.randint(5, 24, (len(lengths), width), generator=gen)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : width - length] = PAD
        mask[row, : width - length] = 0
    return {"input_ids": ids, "attention_mask": mask}


def plain(model: Any, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return model.generate(**{"max_new_tokens": 16, "do_sample": True, **options})


def watched(
    model: Any,
    monitor: Monitor,
    seed: int = 0,
    *,
    attach: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    with monitor.attach(model, **(attach or {})) as m:
        others = options.pop("logits_processor", [])
        return m, plain(model, seed, logits_processor=[*others, m.halting()], **options)


def twins(
    m: Any, output: torch.Tensor, bare: torch.Tensor, width: int, ends: Any = (EOS,)
) -> list[bool]:
    """Check each row against its unwatched twin; return which were halted."""
    halts = []
    for report, got, want in zip(
        m.reports, output[:, width:].tolist(), bare[:, width:].tolist(), strict=True
    ):
        response = toy.before_end(want, ends)
        at = toy.first_bad(response)
        fed = len(response) if len(response) < len(want) else len(response) - 1
        if at is None or at >= fed:  # the very last token is never fed
            n = min(len(got), len(want))
            assert got[:n] == want[:n]
            assert report.verdict == "CONTINUE"
            assert report.unscored == len(response) - fed
        else:
            assert got[: at + 2] == [*want[: at + 1], ends[0]]
            assert report.halted_at == report.prompt_tokens + at
            assert (report.verdict, report.cause) == ("HALT", "bad")
            assert (report.scored, report.unscored) == (at + 1, 0)
        halts.append(report.verdict == "HALT")
    return halts


LENGTHS = (5, 2, 7, 1, 4, 7)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.95},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
        {"eos_token_id": [EOS, 7]},
        {"eos_token_id": [9, EOS, 7], "pad_token_id": 9},
        {"min_new_tokens": 12},
        {"typical_p": 0.9},
        {"eta_cutoff": 0.01, "epsilon_cutoff": 0.01, "min_p": 0.01},
        {"top_h": 0.6},
        {"renormalize_logits": True, "remove_invalid_values": True},
        {"suppress_tokens": [EOS]},
    ],
    ids=str,
)
def test_rows_halt_in_the_step_of_their_bad_token_and_others_are_untouched(
    options: dict[str, Any],
) -> None:
    model, inputs = toy.new_model(), prompts(*LENGTHS)
    ends = options.get("eos_token_id", (EOS,))
    seen = []
    for seed in range(2):
        bare = plain(model, seed, **inputs, **options)
        m, output = watched(model, toy.monitor(), seed, **inputs, **options)
        seen += twins(m, output, bare, 7, ends)
        assert m.monitor.free_slots == 8
    assert 0 < sum(seen) < len(seen)


def test_greedy() -> None:
    seen = []
    for length in range(1, 9):
        inputs = prompts(length, length + 3)
        options = {**inputs, "do_sample": False, "max_new_tokens": 24, "repetition_penalty": 3.0}
        bare = plain(toy.model(), **options)
        m, output = watched(toy.model(), toy.monitor(), **options)
        seen += twins(m, output, bare, length + 3)
    assert 0 < sum(seen) < len(seen)


def test_scores_and_logits_of_going_rows_are_the_same_bit_for_bit() -> None:
    options = {
        **prompts(*LENGTHS),
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    bare = plain(toy.model(), 1, **options)
    m, output = watched(toy.model(), toy.monitor(), 1, **options)
    going = [
        row
        for row, halted in enumerate(twins(m, output.sequences, bare.sequences, 7))
        if not halted
    ]
    assert 0 < len(going) < len(LENGTHS)
    for kind in ("scores", "logits"):
        for got, want in zip(output[kind], bare[kind], strict=False):
            assert torch.equal(got[going], want[going])


def test_several_sequences_per_prompt() -> None:
    options = {**prompts(3, 5), "num_return_sequences": 4}
    bare = plain(toy.model(), **options)
    m, output = watched(toy.model(), toy.monitor(), **options)
    assert [r.prompt_tokens for r in m.reports] == [3] * 4 + [5] * 4
    assert any(twins(m, output, bare, 5))


def test_a_generation_config_counts_and_is_left_as_it_was() -> None:
    config = GenerationConfig(
        max_new_tokens=9, do_sample=True, eos_token_id=[11, EOS], pad_token_id=PAD
    )
    before = config.to_dict()
    inputs = prompts(*LENGTHS)
    torch.manual_seed(0)
    bare = toy.model().generate(
        inputs["input_ids"], config, attention_mask=inputs["attention_mask"]
    )
    with toy.monitor().attach(toy.model()) as m:
        torch.manual_seed(0)
        # all by position
        output = toy.model().generate(
            inputs["input_ids"], config, [m.halting()], attention_mask=inputs["attention_mask"]
        )
    assert any(twins(m, output, bare, 7, [11, EOS]))
    assert config.to_dict() == before


def test_pads_and_ends_inside_the_prompt_are_part_of_it() -> None:
    ids = torch.tensor([[EOS, 9, PAD, 8, EOS], [PAD, PAD, 9, EOS, 8]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    bare = plain(toy.model(), 3, input_ids=ids, attention_mask=mask)
    m, output = watched(toy.model(), toy.monitor(), 3, input_ids=ids, attention_mask=mask)
    assert [r.prompt_tokens for r in m.reports] == [5, 3]
    twins(m, output, bare, 5)
    # without a mask generate would take the pad inside for padding
    with pytest.raises(UnsupportedGenerationError, match=r"masked elsewhere.*attention_mask"):
        watched(toy.model(), toy.monitor(), 3, input_ids=ids)


@pytest.mark.parametrize("mask", [[1, 0, 1, 1], [1, 1, 1, 0]])
def test_masks_that_split_a_prompt_or_pad_on_the_right_are_refused(mask: list[int]) -> None:
    ids = torch.tensor([[7, 8, 9, 10]])
    with pytest.raises(UnsupportedGenerationError, match="pad on the left"):
        watched(toy.model(), toy.monitor(), input_ids=ids, attention_mask=torch.tensor([mask]))


def test_a_body_without_generate_is_refused() -> None:
    body = toy.model().model
    with pytest.raises(UnsupportedGenerationError, match="LlamaModel has no generate"):
        Monitor(toy.bundle(body)).attach(body)


def test_without_a_mask_pads_that_end_sequences_are_no_padding() -> None:
    ids = torch.tensor([[EOS, EOS, 9], [7, 8, 9]])
    m, _ = watched(toy.model(), toy.monitor(), input_ids=ids, pad_token_id=EOS)
    assert [r.prompt_tokens for r in m.reports] == [3, 3]


class Favour(LogitsProcessor):
    """Writes a given response."""

    def __init__(self, *rows: list[int], width: int) -> None:
        self.rows, self.width = rows, width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.width
        forced = torch.full_like(scores, -torch.inf)
        for row, tokens in enumerate(self.rows):
            forced[row, tokens[step]] = 0.0
        return forced


def write(
    monitor: Monitor, *rows: list[int], attach: Any = None, **options: Any
) -> tuple[Any, torch.Tensor]:
    """Have the toy write the rows after prompts of two tokens."""
    return watched(
        toy.model(),
        monitor,
        attach=attach,
        **prompts(*[2] * len(rows)),
        logits_processor=[Favour(*rows, width=2)],
        **{"max_new_tokens": len(rows[0]), **options},
    )


def test_a_pad_that_was_sampled_is_a_token_like_any_other() -> None:
    m, output = write(toy.monitor(), [9, PAD, 8, PAD, 7, EOS], [9, PAD, BAD, PAD, 7, 8])
    assert output[:, 2:].tolist() == [[9, PAD, 8, PAD, 7, EOS], [9, PAD, BAD, EOS, PAD, PAD]]
    assert [r.scored for r in m.reports] == [5, 3]
    assert [ids.tolist() for ids in m.released(output)] == [[9, PAD, 8, PAD, 7], [9, PAD]]


@pytest.mark.parametrize(
    ("hold_back", "on_unscored", "left"),
    [
        (1, "hold", [[9, 8, 7, 6, 9], [9, 8], [9, 8, 7], [], [8, 8, 8, 8, 8]]),
        (3, "hold", [[9, 8, 7, 6, 9], [], [9, 8, 7], [], [8, 8, 8, 8, 8]]),
        ("turn", "hold", [[9, 8, 7, 6, 9], [], [9, 8, 7], [], [8, 8, 8, 8, 8]]),
        (1, "pass", [[9, 8, 7, 6, 9, 8], [9, 8], [9, 8, 7], [], [8, 8, 8, 8, 8, BAD]]),
        (3, "pass", [[9, 8, 7, 6, 9, 8], [], [9, 8, 7], [], [8, 8, 8, 8, 8, BAD]]),
        (1, "halt", [[9, 8, 7, 6, 9], [9, 8], [9, 8, 7], [], [8, 8, 8, 8, 8]]),
    ],
)
def test_what_may_leave(hold_back: Any, on_unscored: str, left: list[list[int]]) -> None:
    monitor = toy.monitor(hold_back=hold_back, on_unscored=on_unscored)
    m, output = write(
        monitor,
        [9, 8, 7, 6, 9, 8],  # ends by length: the last token is never fed
        [9, 8, BAD, 6, 9, 8],
        [9, 8, 7, EOS, PAD, PAD],
        [BAD, 8, 7, 6, 9, 8],
        [8, 8, 8, 8, 8, BAD],
    )
    assert [ids.tolist() for ids in m.released(output)] == left
    assert [r.finish_reason for r in m.reports] == [
        "length", "content_filter", "stop", "content_filter", "length"
    ]  # fmt: skip
    assert [r.unscored for r in m.reports] == [1, 0, 0, 0, 1]


def test_what_may_leave_needs_a_trace_but_not_all_of_it() -> None:
    m, output = write(toy.monitor(trace=2), [9, 8, 7, 6, 9, EOS], [9, 8, 6, 7, BAD, 8])
    assert [ids.tolist() for ids in m.released(output)] == [[9, 8, 7, 6, 9], [9, 8, 6, 7]]
    for on_unscored in ("hold", "pass"):
        m, output = write(toy.monitor(trace=0, on_unscored=on_unscored), [9, BAD, 7])
        with pytest.raises(ValueError, match="trace"):
            m.released(output)


def test_observing_changes_nothing_and_reports_all() -> None:
    inputs = prompts(*LENGTHS)
    bare = plain(toy.model(), **inputs)
    for processors in (False, True):
        with toy.monitor().attach(toy.model(), enforce=False) as m:
            output = plain(
                toy.model(), **inputs, logits_processor=[m.halting()] if processors else None
            )
        assert torch.equal(output, bare)
        responses = [toy.before_end(row) for row in bare[:, 7:].tolist()]
        for report, response, ids in zip(m.reports, responses, m.released(output), strict=True):
            at = toy.first_bad(response[: report.scored])
            assert report.halted_at == (None if at is None else report.prompt_tokens + at)
            assert ids.tolist() == response[: report.scored if at is None else at]


def test_observing_does_not_mind_where_its_processor_stands() -> None:
    with toy.monitor().attach(toy.model(), enforce=False) as m:
        other = Meddler(lambda: None)
        output = plain(toy.model(), **prompts(3), logits_processor=[m.halting(), other])
    assert torch.equal(output, plain(toy.model(), **prompts(3)))
    assert m.reports[0].scored > 0


class StopAt(StoppingCriteria):
    """Ends a row that wrote a token."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, -1] == self.token


def test_rows_ended_by_a_stopping_criterion() -> None:
    rows = [9, 8, 7, 6, BAD, 5, 5], [9, BAD, 7, 6, 5, 5, 5], [9, 8, 8, 8, 8, 7, 5]
    m, output = write(toy.monitor(), *rows, stopping_criteria=[StopAt(7)], pad_token_id=EOS)
    assert output[:, 2:].tolist() == [
        [9, 8, 7, EOS, EOS, EOS],
        [9, BAD, EOS, EOS, EOS, EOS],
        [9, 8, 8, 8, 8, 7],
    ]
    assert [r.finish_reason for r in m.reports] == ["stop", "content_filter", "stop"]
    # the first row's last token was fed while the others went on, the last row's never was
    assert [(r.scored, r.unscored) for r in m.reports] == [(3, 0), (2, 0), (5, 1)]


def test_stop_strings() -> None:
    m, output = write(
        toy.monitor(), [9, 8, 7, 6, 5], [9, 6, 6, 6, 6],
        stop_strings=["w7"], tokenizer=toy.tokenizer(), pad_token_id=EOS,
    )  # fmt: skip
    assert output[:, 2:].tolist() == [[9, 8, 7, EOS, EOS], [9, 6, 6, 6, 6]]
    assert [r.finish_reason for r in m.reports] == ["stop", "length"]


def test_a_processor_can_be_used_again_with_another_end() -> None:
    with toy.monitor().attach(toy.model()) as m:
        processor = m.halting()
        for end in (EOS, 17):
            output = plain(
                toy.model(),
                **prompts(2),
                max_new_tokens=4,
                eos_token_id=end,
                logits_processor=[Favour([9, BAD, 8, 8], width=2), processor],
            )
            assert output[0, 2:].tolist() == [9, BAD, end]


def poison(model: Any, row: int, position: int) -> Any:
    """Make the hidden state of one token NaN after the last layer that is tapped here."""
    fed = [0]

    def hook(module: Any, args: Any, kwargs: Any) -> Any:
        hidden = (args[0] if args else kwargs["hidden_states"]).clone()
        first, fed[0] = fed[0], fed[0] + hidden.shape[1]
        if first <= position < fed[0]:
            hidden[row, position - first] = torch.nan
        return (
            ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
        )

    return model.model.layers[0].register_forward_pre_hook(hook, with_kwargs=True, prepend=True)


@pytest.mark.parametrize("on_unscored", ["pass", "hold", "halt"])
def test_nan_activations_of_one_row_do_what_the_policy_says_and_touch_no_other(
    on_unscored: str,
) -> None:
    model = toy.new_model()
    rows = [9, 8, 7, 6, EOS], [9, 8, 7, BAD, 5], [9, 8, 7, 6, EOS]
    with poison(model, row=0, position=3):  # the second token written
        m, output = watched(
            model,
            toy.monitor(model, on_unscored=on_unscored),
            **prompts(2, 2, 2),
            logits_processor=[Favour(*rows, width=2)],
            max_new_tokens=5,
        )
    sick = m.reports[0]
    assert [r.unscored >= 1 for r in m.reports] == [True, False, False]
    assert [ids.tolist() for ids in m.released(output)][1:] == [[9, 8, 7], [9, 8, 7, 6]]
    assert [r.verdict for r in m.reports[1:]] == ["HALT", "CONTINUE"]
    if on_unscored == "halt":
        assert (sick.verdict, sick.cause, sick.halted_at) == ("HALT", "unscored", 3)
        assert output[0, 2:].tolist() == [9, 8, EOS, PAD, PAD]
        assert m.released(output)[0].tolist() == [9]
    else:
        assert sick.verdict != "HALT"
        assert m.released(output)[0].tolist() == [9, 8, 7, 6]


def refusals() -> dict[str, tuple[dict[str, Any], str]]:
    two = torch.tensor([[9, 8]])
    cache = DynamicCache(config=toy.model().config)
    toy.model()(two[:, :1], past_key_values=cache)
    return {
        "beams": ({"num_beams": 2}, "beam_search moves streams between rows.*num_beams=1"),
        "beam sample": ({"num_beams": 2, "do_sample": True}, "moves streams between rows"),
        "beams by config": ({"generation_config": GenerationConfig(num_beams=3)}, "beam"),
        "assisted": ({"assistant_model": toy.new_model()}, "assisted"),
        "prompt lookup": ({"prompt_lookup_num_tokens": 3}, "assisted"),
        "contrastive": ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive"),
        "streamer": ({"streamer": TextStreamer(toy.tokenizer())}, "streamer sees.*hf.stream"),
        "chunks": ({"prefill_chunk_size": 2}, "prefill_chunk_size splits"),
        "custom": ({"custom_generate": lambda *a, **k: None}, "custom_generate replaces"),
        "guidance": ({"guidance_scale": 1.5}, "guidance_scale runs the model"),
        "healing": ({"token_healing": True, "tokenizer": toy.tokenizer()}, "token_healing changes"),
        "paged": ({"cache_implementation": "paged"}, "paged"),
        "embeddings": ({"inputs_embeds": torch.zeros(1, 2, 32)}, "inputs_embeds hides"),
        "no processor": ({"logits_processor": None}, r"\[m.halting\(\)\].*enforce=False"),
        "not the last": ({"logits_processor": "first"}, "as the last"),
        "no ids": ({"input_ids": None}, "input_ids"),
        "one dimension": ({"input_ids": two[0]}, r"input_ids \[B, tokens\]"),
        "no tokens": ({"input_ids": two[:, :0]}, "the prompt is empty"),
        "all padding": ({"attention_mask": torch.zeros_like(two)}, r"rows \[0\] are empty"),
        "too long": ({"input_ids": torch.full((1, 64), 9)}, "64 tokens, the model's window is 64"),
        "too many rows": ({"input_ids": two.repeat(9, 1)}, "9 rows for 8 free slots; .*more slots"),
        "filled cache": ({"past_key_values": cache}, "no cache that was filled before"),
        "pads": ({"stopping_criteria": [StopAt(7)]}, "pass pad_token_id=eos_token_id"),
        "no end": ({"generation_config": GenerationConfig(eos_token_id=None)}, "no eos_token_id"),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(refusals()))
def test_what_cannot_be_watched_is_refused_and_leaves_nothing_behind(name: str) -> None:
    options, message = refusals()[name]
    model, monitor = toy.new_model(), toy.monitor()
    if name == "no end":
        model.generation_config.eos_token_id = None
    inputs = torch.tensor([[9, 8]])
    with monitor.attach(model) as m:
        processors = [m.halting()]
        if options.get("logits_processor") == "first":
            options["logits_processor"] = [m.halting(), Favour([9, 9], width=2)]
        with pytest.raises(UnsupportedGenerationError, match=message):
            model.generate(
                **{
                    "input_ids": inputs,
                    "logits_processor": processors,
                    "max_new_tokens": 3,
                    **options,
                }
            )
        assert monitor.free_slots == 8
        if name != "no end":  # and the attachment still works
            assert plain(model, input_ids=inputs, logits_processor=processors).shape[0] == 1
    assert "generate" not in vars(model)


def test_a_forward_pass_outside_of_generate_is_refused() -> None:
    model = toy.new_model()
    with (
        toy.monitor().attach(model),
        pytest.raises(UnsupportedGenerationError, match=r"engines\.hf\.score"),
    ):
        model(torch.tensor([[9, 8]]))
    model(torch.tensor([[9, 8]]))


class Meddler(LogitsProcessor):
    """Does something of its own between two steps."""

    def __init__(self, meddle: Callable[[], Any]) -> None:
        self.meddle = meddle

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.meddle()
        return scores


@pytest.mark.parametrize("enforce", [True, False])
def test_generate_inside_generate_and_passes_of_others_are_refused(enforce: bool) -> None:
    model, monitor = toy.new_model(), toy.monitor()
    one = torch.tensor([[9]])
    for meddle, message in (
        (lambda: model.generate(one), "running already"),
        (lambda: model(input_ids=one), "2 forward passes of the attached model in 1 step"),
    ):
        if not enforce and "passes" in message:
            message = "forward passes of the attached model"
        with monitor.attach(model, enforce=enforce) as m:
            processors = [Meddler(meddle), *([m.halting()] if enforce else [])]
            with pytest.raises(UnsupportedGenerationError, match=message):
                plain(model, input_ids=one, logits_processor=processors)
        assert [r.finish_reason for r in m.reports] == ["error"]
        assert monitor.free_slots == 8


def test_a_wrapper_whose_inner_model_generates_is_watched() -> None:
    class Wrapper(torch.nn.Module):
        """What PEFT does: generate belongs to the model inside."""

        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner
            self.config, self.generation_config = inner.config, inner.generation_config

        def generate(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner.generate(*args, **kwargs)

        def get_input_embeddings(self) -> Any:
            return self.inner.get_input_embeddings()

    inner = toy.new_model(architectures=["LlamaForCausalLM"])
    ids = torch.tensor([[9]])
    reports = []
    for model in (inner, Wrapper(inner)):
        with toy.monitor().attach(model) as m:
            plain(model, input_ids=ids, logits_processor=[m.halting()])
        reports.append(m.reports[0])
    assert reports[0] == reports[1]
    assert reports[1].scored > 0


def test_a_model_whose_layers_do_not_run_is_refused() -> None:
    class Elsewhere(torch.nn.Module):
        """Generates with another copy of its layers than the one that can be tapped."""

        def __init__(self, shown: Any, used: Any) -> None:
            super().__init__()
            self.shown = shown
            self.used = [used]  # not a submodule
            self.config, self.generation_config = used.config, used.generation_config

        def generate(self, *args: Any, **kwargs: Any) -> Any:
            return self.used[0].generate(*args, **kwargs)

        def get_input_embeddings(self) -> Any:
            return self.shown.get_input_embeddings()

    models = [toy.new_model(architectures=["LlamaForCausalLM"]) for _ in range(2)]
    model, monitor = Elsewhere(*models), toy.monitor()
    with (
        monitor.attach(model) as m,
        pytest.raises(UnsupportedGenerationError, match="0 forward passes of the attached model"),
    ):
        plain(model, input_ids=torch.tensor([[9]]), logits_processor=[m.halting()])
    assert monitor.free_slots == 8


def test_a_later_tap_that_is_read_twice_in_a_pass_is_refused() -> None:
    model = toy.new_model()
    late = Probe("late", "h", Tap(1, "resid_post"), torch.ones(32) / 32)
    monitor = toy.monitor(model, probes=[toy.detector(model), late])
    layer = model.model.layers[1]
    inside: list[bool] = []

    def run_again(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if not inside:
            inside.append(True)
            module(*args, **kwargs)
            inside.clear()

    with monitor.attach(model) as m:
        options = {**prompts(3, 2), "use_cache": False, "logits_processor": [m.halting()]}
        hook = layer.register_forward_hook(run_again, with_kwargs=True)
        with pytest.raises(UnsupportedGenerationError, match=r"resid_post\.1 was read more than"):
            plain(model, **options)
        hook.remove()
        plain(model, **options)


def hooks_of(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_an_exception_frees_slots_and_hooks_and_the_next_run_is_clean() -> None:
    model, monitor = toy.new_model(), toy.monitor()
    before = hooks_of(model)
    steps = [0]

    def fail() -> None:
        steps[0] += 1
        if steps[0] == 4:
            assert hooks_of(model) > before
            raise RuntimeError("boom")

    m = monitor.attach(model)
    with pytest.raises(RuntimeError, match="boom"), m:
        plain(model, **prompts(2, 3), logits_processor=[Meddler(fail), m.halting()])
    assert hooks_of(model) == before
    assert "generate" not in vars(model)
    assert monitor.free_slots == 8
    assert [(r.stream, r.finish_reason) for r in m.reports] == [
        ("stream-0", "error"),
        ("stream-1", "error"),
    ]
    inputs = prompts(*LENGTHS)
    bare = plain(model, **inputs)
    with m:  # an attachment can be entered again
        output = plain(model, **inputs, logits_processor=[m.halting()])
    assert any(twins(m, output, bare, 7))
    assert hooks_of(model) == before


def test_a_forward_pass_that_fails_half_way_leaves_no_logits_behind() -> None:
    model = toy.new_model()
    monitor = toy.monitor(model)
    with monitor.attach(model) as m:
        hook = model.lm_head.register_forward_hook(lambda *_: 1 / 0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                plain(model, input_ids=torch.tensor([[9, BAD]]), logits_processor=[m.halting()])
        hook.remove()
        assert monitor._logits.isnan().all()
        plain(model, input_ids=torch.tensor([[9, 8, 7]]), logits_processor=[m.halting()])


def test_one_attachment_per_model_and_per_monitor() -> None:
    model, monitor = toy.new_model(), toy.monitor()
    with monitor.attach(model) as m:
        with pytest.raises(UnsupportedGenerationError, match="watched already"):
            toy.monitor().attach(model).__enter__()
        with pytest.raises(MonitorInUseError, match="in use"):
            monitor.attach(toy.new_model()).__enter__()
        with pytest.raises(UnsupportedGenerationError, match="watched already"):
            next(score(model, toy.tokenizer(), ["w7"], toy.monitor()))
        plain(model, **prompts(2), logits_processor=[m.halting()])
    assert hooks_of(model) == 0
    with monitor.attach(toy.new_model()):
        pass


def test_a_model_the_bundle_was_not_made_for_is_refused() -> None:
    model = toy.new_model()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.1)
    for other in (model, toy.new_model(num_hidden_layers=3), tiny_models.tiny("gpt2")):
        with pytest.raises(WrongModelError, match="wrong model"):
            toy.monitor().attach(other)


def test_tiers() -> None:
    tiers = {"strict": Thresholds(horizon=0, halt_at=1e-6), "moderate": toy.HORIZON_0}
    monitor = toy.monitor(tiers=tiers)
    m, output = write(monitor, [9, 8, 7], attach={"tier": "strict"})
    assert output[0, 2:].tolist() == [9, EOS]
    assert m.reports[0].tier == "strict"
    with pytest.raises(PolicyError, match="loose"):
        monitor.attach(toy.model(), tier="loose")


def test_a_prompt_probe_halts_before_the_first_token() -> None:
    model = toy.model()
    reader = toy.detector(model, name="prompt", reads="prompt")
    given = toy.bundle(probes=[toy.detector(model), reader])
    chain = toy.trusting_chain(reads_prompt=True).model_copy(update={"prior": [0.5, 0.5]})
    monitor = Monitor(replace(given, chain=chain), slots=2)
    ids = torch.tensor([[PAD, 9, BAD], [BAD, 9, 8]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    m, output = watched(model, monitor, input_ids=ids, attention_mask=mask)
    # the evidence is that of the last prompt token
    assert [r.halted_at for r in m.reports] == [1, None]
    assert output[0, 3] == EOS
    assert m.released(output)[0].tolist() == []


@pytest.mark.parametrize("name", ["gpt2", "mamba2", "gemma2", "mixtral"])
@pytest.mark.parametrize("batch", [1, 3])
def test_other_architectures(name: str, batch: int) -> None:
    """Every token's logits are those of its own hidden state, under its own position."""
    model = tiny_models.tiny(name)
    d = model.config.get_text_config().hidden_size
    gen = torch.Generator().manual_seed(1)
    # hidden_states[i] of transformers is the input of layer i, of Mamba-2 its output
    taps = {0: Tap(0, "resid_pre"), 1: Tap(0, "resid_post"), 2: Tap(2, "resid_pre")}
    if name == "mamba2":
        taps = {0: Tap(0, "resid_post"), 1: Tap(2, "resid_pre")}
    probes = {
        layer: Probe(str(tap), "h", tap, torch.randn(d, generator=gen) / d, evidence=Ema(alpha=0.5))
        for layer, tap in taps.items()
    }
    ids = torch.randint(5, 60, (batch, 6), generator=gen)
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[0, :3], ids[0, :3] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 8}
    bare = plain(model, **inputs, return_dict_in_generate=True, output_hidden_states=True)
    monitor = toy.monitor(model, probes=probes.values(), tiers=NEVER)
    m, output = watched(model, monitor, **inputs)
    assert torch.equal(output, bare.sequences)
    for row, report in enumerate(m.reports):
        start = int(mask[row].sum())
        response = toy.before_end(output[row, 6:].tolist())
        scored = min(len(response), 7)
        assert (report.scored, report.unscored) == (scored, len(response) - scored)
        assert report.trace.position == list(range(start + scored))
        for layer, tap in taps.items():
            prompt = bare.hidden_states[0][layer][row, mask[row].bool()]
            fed = [states[layer][row] for states in bare.hidden_states[1 : scored + 1]]
            want = torch.cat([prompt, *fed]) @ probes[layer].weight
            assert report.trace.scores[str(tap)] == pytest.approx(want.tolist(), abs=1e-5)


def test_decoded_text_of_what_may_leave() -> None:
    m, output = write(toy.monitor(), [9, 8, BAD, 6], [9, 8, EOS, PAD])
    assert toy.tokenizer().batch_decode(m.released(output)) == ["w9w8", "w9w8"]


def test_the_first_token_may_be_the_only_one_fed() -> None:
    m, output = watched(
        toy.model(), toy.monitor(), input_ids=torch.tensor([[BOS]]), max_new_tokens=1
    )
    assert (m.reports[0].scored, m.reports[0].unscored) in [(0, 1), (0, 0)]
    assert m.reports[0].prompt_tokens == 1
    assert m.released(output)[0].tolist() == []
