"""Taps: what they read, what they leave behind, and which models they refuse."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    CLIPVisionConfig,
    CompileConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from midstream.taps import (
    SITES,
    Tap,
    TapHandles,
    UnreadableModelError,
    attach_taps,
    decoder_layers,
    hidden_size,
)

from .tiny_models import ARCHITECTURES, LAYERS, VOCAB, tiny

PROMPT = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
ENDS = [Tap(layer, site) for layer in range(LAYERS) for site in ("resid_pre", "resid_post")]
MIDDLES = [Tap(layer, "resid_mid") for layer in range(LAYERS)]

model_of = functools.cache(tiny)  # taps leave a model as it was, so tests may share it


def read_once(model: nn.Module, taps: list[Tap], **inputs: Any) -> dict[Tap, Tensor]:
    """The tensors that the taps read in one forward pass."""
    seen: dict[Tap, Tensor] = {}

    def read(tap: Tap, hidden: Tensor) -> None:
        assert tap not in seen
        seen[tap] = hidden

    with torch.no_grad(), attach_taps(model, taps, read):
        model(**(inputs or {"input_ids": PROMPT}))
    assert seen.keys() == set(taps)
    return seen


def hooks_of(model: nn.Module) -> list[list[Any]]:
    tables = ("_forward_hooks", "_forward_pre_hooks")
    flags = ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return [list(getattr(m, name).items()) for m in model.modules() for name in tables + flags]


class TestTap:
    @pytest.mark.parametrize("site", SITES)
    def test_string_form_is_read_back(self, site: Any) -> None:
        assert str(Tap(12, site)) == f"{site}.12"
        assert Tap.parse(f"{site}.12") == Tap(12, site)

    @pytest.mark.parametrize(
        "text", ["", "resid_post", "resid_post.", "resid_post.-1", "resid_post.1.2", "head_out.1"]
    )
    def test_other_text_is_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match="is not a tap: write one such as"):
            Tap.parse(text)

    def test_negative_layer_is_refused(self) -> None:
        with pytest.raises(ValueError, match="tap layer -1 is negative"):
            Tap(-1, "resid_post")

    def test_unknown_site_is_refused(self) -> None:
        with pytest.raises(ValueError, match="unknown tap site 'head_out': use one of resid_pre"):
            Tap(0, "head_out")  # type: ignore[arg-type]

    def test_taps_sort_as_they_are_computed(self) -> None:
        taps = [Tap(layer, site) for layer in (2, 10) for site in SITES]
        assert sorted([*taps[3:], *taps[2::-1]]) == taps
        assert Tap(2, "resid_post") >= Tap(2, "resid_pre")


# The norm between the last layer and hidden_states[-1].
FINAL_NORM = {
    "bert": None,
    "falcon": "transformer.ln_f",
    "gpt2": "transformer.ln_f",
    "gpt_neox": "gpt_neox.final_layer_norm",
    "mamba2": "backbone.norm_f",
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layer_ends_are_the_hidden_states(name: str) -> None:
    model = model_of(name)
    with torch.no_grad():
        hidden_states = model(input_ids=PROMPT, output_hidden_states=True).hidden_states
        final_norm = FINAL_NORM.get(name, "model.norm")
        norm = model.get_submodule(final_norm) if final_norm else nn.Identity()
        seen = read_once(model, ENDS)
        if name == "mamba2":  # its list begins with the first layer's output, unlike all others'
            embedded = model.get_input_embeddings()(PROMPT)
            hidden_states = (embedded, *hidden_states[: LAYERS - 1], hidden_states[LAYERS])
        assert len(hidden_states) == LAYERS + 1
        for layer in range(LAYERS):
            post = seen[Tap(layer, "resid_post")]
            after = norm(post) if layer == LAYERS - 1 else post
            assert post.shape == (*PROMPT.shape, hidden_size(model))
            assert torch.equal(seen[Tap(layer, "resid_pre")], hidden_states[layer])
            assert torch.equal(after, hidden_states[layer + 1])


# Of each architecture, the modules whose outputs are added to the stream: attention's and MLP's.
LLAMA_LIKE = ("self_attn", "mlp")
NORMED_BRANCHES = ("post_attention_layernorm", "post_feedforward_layernorm")
BRANCHES = {
    "deepseek_v3": LLAMA_LIKE,
    "falcon": ("self_attention", "mlp"),
    "gemma2": NORMED_BRANCHES,
    "gemma3_text": NORMED_BRANCHES,
    "gpt2": ("attn", "mlp"),
    "gpt_neox": ("attention", "mlp"),
    "gpt_oss": LLAMA_LIKE,
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "mixtral": LLAMA_LIKE,
    "olmo2": NORMED_BRANCHES,
    "phi3": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "qwen3_moe": LLAMA_LIKE,
    "stablelm": LLAMA_LIKE,
    "bert": ("attention.output.dense", "output.dense"),
}
SEQUENTIAL = {"falcon": {"parallel_attn": False}, "gpt_neox": {"use_parallel_residual": False}}


@pytest.mark.parametrize("name", BRANCHES)
def test_middle_lies_between_the_branches(name: str) -> None:
    model = model_of(name, **SEQUENTIAL.get(name, {}))
    outputs: dict[tuple[int, str], Tensor] = {}

    def keep(key: tuple[int, str]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs[key] = output[0] if isinstance(output, tuple) else output

        return hook

    attention, mlp = BRANCHES[name]
    hooks = [
        layer.get_submodule(path).register_forward_hook(keep((i, path)))
        for i, layer in enumerate(decoder_layers(model))
        for path in (attention, mlp)
    ]
    seen = read_once(model, ENDS + MIDDLES)
    for hook in hooks:
        hook.remove()
    for i, layer in enumerate(decoder_layers(model)):
        pre, middle, post = (seen[Tap(i, site)] for site in SITES)
        expected_middle, expected_post = pre + outputs[i, attention], middle + outputs[i, mlp]
        if name == "bert":  # norms the stream itself after each addition
            expected_middle = layer.attention.output.LayerNorm(expected_middle)
            expected_post = layer.output.LayerNorm(expected_post)
        assert torch.equal(middle, expected_middle)
        assert torch.equal(post, expected_post)
        assert not torch.equal(middle, pre)
        assert not torch.equal(middle, post)


ONCE = r"adds to the stream once \(attention and MLP in parallel, or a mixer alone\): use resid_pre"
BETWEEN = r"adds attention and MLP in parallel \(no submodule takes the sum in between\): use resid"


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("gpt_neox", {}, ONCE),
        ("falcon", {}, ONCE),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, ONCE),
        ("mamba2", {}, ONCE),
        ("stablelm", {"use_parallel_residual": True}, BETWEEN),
    ],
)
def test_layers_without_a_middle_are_refused(name: str, changes: Any, reason: str) -> None:
    model = model_of(name, **changes)
    before = hooks_of(model)
    with pytest.raises(
        UnreadableModelError, match=f"{type(model).__name__} has no resid_mid.1 to read"
    ) as error:
        attach_taps(model, [Tap(0, "resid_pre"), Tap(1, "resid_mid")], print)
    assert error.match(reason)
    assert hooks_of(model) == before


class ToyConfig(PreTrainedConfig):
    model_type = "toy"

    def __init__(self, **changes: Any) -> None:
        self.hidden_size = 7
        self.num_hidden_layers = 2
        super().__init__(**changes)


class ToyLayer(nn.Module):
    """Attention and MLP stand-ins; the variants below differ in how they add to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2, self.norm_3 = nn.RMSNorm(7), nn.RMSNorm(7), nn.RMSNorm(7)
        self.attention, self.mlp, self.adapter = nn.Linear(7, 7), nn.Linear(7, 7), nn.Linear(7, 7)
        self.dropout = nn.Dropout()

    def forward(self, hidden_states: Tensor) -> Any:
        hidden_states = hidden_states + self.attention(self.norm_1(hidden_states))
        return hidden_states + self.mlp(self.norm_2(hidden_states))


class Listing(ToyLayer):
    def forward(self, hidden_states: Tensor) -> Any:
        return [super().forward(hidden_states), "weights"]


class DroppedOut(ToyLayer):
    """In eval mode, dropout hands on the very tensor that it is given."""

    def forward(self, hidden_states: Tensor) -> Any:
        hidden_states = self.dropout(hidden_states + self.attention(self.norm_1(hidden_states)))
        return self.dropout(hidden_states + self.mlp(self.norm_2(hidden_states)))


class BareMLP(ToyLayer):
    """A matrix that takes the sum is no norm: the way back must not run through it."""

    def forward(self, hidden_states: Tensor) -> Any:
        hidden_states = hidden_states + self.attention(self.norm_1(hidden_states))
        return hidden_states + self.mlp(hidden_states)


class NestedMLP(BareMLP):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(7, 7), nn.GELU(), nn.Linear(7, 7))  # type: ignore[assignment]


class TwoWaysBack(ToyLayer):
    """Nothing tells this activation from a norm of the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.GELU()  # type: ignore[assignment]

    def forward(self, hidden_states: Tensor) -> Any:
        hidden_states = hidden_states + self.attention(self.norm_1(hidden_states))
        return hidden_states + self.mlp(hidden_states)


class NormCarriedOn(ToyLayer):
    """The norm is carried on (Bloom with apply_residual_connection_post_layernorm)."""

    def forward(self, hidden_states: Tensor) -> Any:
        hidden_states = self.norm_1(hidden_states)
        hidden_states = hidden_states + self.attention(hidden_states)
        return hidden_states + self.mlp(self.norm_2(hidden_states))


class Scaled(ToyLayer):
    def forward(self, hidden_states: Tensor) -> Any:
        return 2 * super().forward(hidden_states)


class Thrice(ToyLayer):
    def forward(self, hidden_states: Tensor) -> Any:
        hidden_states = super().forward(hidden_states)
        return hidden_states + self.adapter(self.norm_3(hidden_states))


class SharedNorm(ToyLayer):
    def forward(self, hidden_states: Tensor) -> Any:
        hidden_states = hidden_states + self.attention(self.norm_1(hidden_states))
        return hidden_states + self.mlp(self.norm_1(hidden_states))


class Parallel(ToyLayer):
    def forward(self, hidden_states: Tensor) -> Any:
        normed = self.norm_2(hidden_states)
        return hidden_states + self.attention(self.norm_1(hidden_states)) + self.mlp(normed)


class InADict(ToyLayer):
    def forward(self, hidden_states: Tensor) -> Any:
        return {"hidden": super().forward(hidden_states)}


class Toy(nn.Module):
    """A model whose layers can be anything, called with a keyword."""

    def __init__(self, layer: type[ToyLayer] = ToyLayer, loops: int = 1, **changes: Any) -> None:
        super().__init__()
        self.config = ToyConfig(**changes)
        self.embed = nn.Embedding(VOCAB, 7)
        self.layers = nn.ModuleList(layer() for _ in range(2))
        self.loops = loops

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden_states = self.embed(input_ids)
        for layer in [*self.layers] * self.loops:
            hidden_states = layer(hidden_states=hidden_states)
            if isinstance(hidden_states, list):
                hidden_states = hidden_states[0]
            if isinstance(hidden_states, dict):
                hidden_states = hidden_states["hidden"]
        return hidden_states


@pytest.mark.parametrize("layer", [ToyLayer, Listing, DroppedOut, BareMLP, NestedMLP])
def test_toy_layers_are_read_at_all_sites(layer: type[ToyLayer]) -> None:
    model = Toy(layer).eval()
    seen = read_once(model, [Tap(0, site) for site in SITES])
    pre, middle, post = (seen[Tap(0, site)] for site in SITES)
    toy = model.layers[0]
    with torch.no_grad():
        assert torch.equal(pre, model.embed(PROMPT))
        assert torch.equal(middle, pre + toy.attention(toy.norm_1(pre)))
        normed = middle if issubclass(layer, BareMLP) else toy.norm_2(middle)
        assert torch.equal(post, middle + toy.mlp(normed))


@pytest.mark.parametrize("layer", [ToyLayer, Parallel])
def test_branches_that_are_zero_mislead_nobody(layer: type[ToyLayer]) -> None:
    model = Toy(layer).eval()
    for linear in (model.layers[0].attention, model.layers[0].mlp):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    if layer is Parallel:
        with pytest.raises(UnreadableModelError, match=BETWEEN):
            attach_taps(model, [Tap(0, "resid_mid")], print)
    else:
        with attach_taps(model, [Tap(0, "resid_mid")], lambda tap, hidden: None):
            assert model.layers[0].norm_2._forward_pre_hooks
            assert not model.layers[0].norm_1._forward_pre_hooks


def test_layers_are_judged_one_by_one() -> None:
    model = Toy()
    model.layers[1] = Parallel()
    attach_taps(model, [Tap(0, "resid_mid"), Tap(1, "resid_post")], print).remove()
    with pytest.raises(UnreadableModelError, match=r"resid_mid\.1 to read, because Parallel adds"):
        attach_taps(model, [Tap(0, "resid_mid"), Tap(1, "resid_mid")], print)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Toy(Scaled), "Scaled does more to the stream than add to it"),
        (Toy(TwoWaysBack), "TwoWaysBack does more to the stream than add to it"),
        (Toy(NormCarriedOn), "NormCarriedOn does more to the stream than add to it"),
        (Toy(InADict), "InADict does more to the stream than add to it"),
        (Toy(Thrice), "Thrice adds to the stream 3 times, not twice"),
        (Toy(SharedNorm), "SharedNorm shares the submodule that takes it"),
        (Toy(loops=2), "ToyLayer runs 2 times in one forward pass"),
    ],
)
def test_streams_that_cannot_be_followed_are_refused(model: Toy, reason: str) -> None:
    with pytest.raises(
        UnreadableModelError, match=f"Toy has no resid_mid.0 to read, because {reason}"
    ):
        attach_taps(model, [Tap(0, "resid_mid")], print)


def test_model_that_fails_while_it_is_followed_is_refused_and_left_clean() -> None:
    model = Toy()
    model.embed = nn.Embedding(0, 7)
    with pytest.raises(
        UnreadableModelError, match=r"run on four tokens, in which Toy failed \(index"
    ):
        attach_taps(model, [Tap(0, "resid_mid")], print)
    assert not any(hooks_of(model))
    assert model.training


class TestFindingLayers:
    def test_outermost_list_of_the_text_part_counts(self) -> None:
        text = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=36,
            intermediate_size=52,
            num_hidden_layers=LAYERS,
            num_attention_heads=6,
            num_key_value_heads=2,
        )
        vision = CLIPVisionConfig(
            hidden_size=20,
            intermediate_size=24,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            image_size=8,
            patch_size=4,
        )
        config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=VOCAB - 1)
        model = LlavaForConditionalGeneration(config).eval()
        assert decoder_layers(model) is model.model.language_model.layers
        assert hidden_size(model) == 36
        seen = read_once(model, [Tap(0, "resid_mid")], input_ids=PROMPT.clamp(max=VOCAB - 2))
        assert seen[Tap(0, "resid_mid")].shape == (2, 9, 36)

    def test_wrappers_are_seen_through(self) -> None:
        class Wrapper(nn.Module):
            config: ClassVar = {
                "model_type": "custom"
            }  # as PEFT has it for a model without a config

            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, **inputs: Any) -> Any:
                return self.inner(**inputs)

        model = model_of("llama")
        wrapped = Wrapper(Wrapper(model))
        assert decoder_layers(wrapped) is model.model.layers
        assert hidden_size(wrapped) == 36
        taps = ENDS + MIDDLES
        seen, bare = read_once(wrapped, taps), read_once(model, taps)
        assert all(torch.equal(seen[tap], bare[tap]) for tap in taps)

    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_models_without_a_head_are_read_alike(self, name: str) -> None:
        model = model_of(name)
        assert decoder_layers(model.base_model) is decoder_layers(model)

    def test_model_without_config_is_refused(self) -> None:
        with pytest.raises(UnreadableModelError, match="Linear has no config: pass a transformers"):
            decoder_layers(nn.Linear(2, 2))

    def test_config_without_width_is_refused(self) -> None:
        model = Toy()
        del model.config.hidden_size
        with pytest.raises(UnreadableModelError, match="the config of Toy has no hidden_size"):
            hidden_size(model)

    def test_encoder_decoder_is_refused(self) -> None:
        config = T5Config(vocab_size=VOCAB, d_model=12, d_kv=4, d_ff=16, num_layers=2, num_heads=3)
        with pytest.raises(UnreadableModelError, match="is an encoder-decoder or half of one: use"):
            decoder_layers(T5ForConditionalGeneration(config))

    def test_decoder_that_attends_to_an_encoder_is_refused(self) -> None:
        with pytest.raises(UnreadableModelError, match="is an encoder-decoder or half of one: use"):
            decoder_layers(tiny("gpt2", add_cross_attention=True))

    def test_model_of_two_text_parts_is_refused(self) -> None:
        model = Toy(text_encoder=ToyConfig(), text_config=ToyConfig())
        with pytest.raises(UnreadableModelError, match="Toy: Multiple valid text configs"):
            decoder_layers(model)

    def test_shared_layers_are_refused(self) -> None:
        config = AlbertConfig(
            vocab_size=VOCAB,
            embedding_size=8,
            hidden_size=12,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=3,
        )
        with pytest.raises(
            UnreadableModelError,
            match=r"keep 3 layers in one ModuleList, but 0 fit "
            r"\(found encoder.albert_layer_groups with 1, .*: pass the submodule",
        ):
            decoder_layers(AlbertModel(config))

    def test_lists_inside_the_layers_do_not_count(self) -> None:
        model = Toy()
        model.layers[1].experts = nn.ModuleList(nn.Linear(7, 7) for _ in range(2))
        assert decoder_layers(model) is model.layers

    def test_two_lists_that_fit_are_refused(self) -> None:
        model = Toy()
        model.others = nn.ModuleList(ToyLayer() for _ in range(2))
        with pytest.raises(
            UnreadableModelError, match=r"but 2 fit \(found layers with 2, others with 2\)"
        ):
            decoder_layers(model)


class TestRefusals:
    def test_layer_that_is_not_there(self) -> None:
        with pytest.raises(
            ValueError, match=r"no tap resid_post\.3: LlamaForCausalLM has 3 layers"
        ):
            attach_taps(model_of("llama"), [Tap(0, "resid_post"), Tap(3, "resid_post")], print)

    def test_tap_given_twice(self) -> None:
        with pytest.raises(ValueError, match=r"tap resid_post.1 is given 2 times"):
            attach_taps(model_of("llama"), [Tap(1, "resid_post"), Tap(1, "resid_post")], print)

    @pytest.mark.parametrize(
        "compiled",
        [
            lambda model: torch.compile(model, backend="eager"),
            lambda model: model.compile(backend="eager") or model,
            lambda model: model.model.layers[1].compile(backend="eager") or model,
            lambda model: setattr(model, "forward", torch.compile(model.forward)) or model,
            # what generate does for static caches where it compiles
            lambda model: model.get_compiled_call(CompileConfig(backend="eager")) and model,
        ],
        ids=["function", "in place", "one layer", "forward", "generate"],
    )
    def test_compiled_model(self, compiled: Callable[[nn.Module], nn.Module]) -> None:
        model = compiled(tiny("llama"))
        with pytest.raises(UnreadableModelError, match="is compiled, and compiled code skips taps"):
            attach_taps(model, [Tap(1, "resid_post")], print)

    def test_compiled_code_that_no_tap_lies_in_is_fine(self) -> None:
        model = tiny("llama")
        model.model.layers[1].mlp.compile(backend="eager")
        attach_taps(model, [Tap(1, "resid_post")], print).remove()

    def test_model_is_read_again_once_generates_compiled_code_is_gone(self) -> None:
        model = tiny("llama")
        model.get_compiled_call(CompileConfig(backend="eager"))
        del model._compiled_call
        read_once(model, ENDS)


class TestTheModelStaysAsItWas:
    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_outputs_do_not_change_and_hooks_come_off(self, name: str) -> None:
        model = model_of(name)
        taps = ENDS + MIDDLES if BRANCHES.get(name) and name not in SEQUENTIAL else ENDS
        with torch.no_grad():
            logits = model(input_ids=PROMPT).logits
            before = hooks_of(model)
            with attach_taps(model, taps, lambda tap, hidden: None):
                assert torch.equal(model(input_ids=PROMPT).logits, logits)
                assert hooks_of(model) != before
            assert hooks_of(model) == before
            assert torch.equal(model(input_ids=PROMPT).logits, logits)

    def test_hooks_come_off_when_the_body_or_the_reader_raises(self) -> None:
        model = model_of("llama")
        before = hooks_of(model)

        def stop(tap: Tap, hidden: Tensor) -> None:
            raise KeyError(str(tap))

        with pytest.raises(KeyError, match=r"resid_mid\.1"), attach_taps(model, MIDDLES[1:], stop):
            model(input_ids=PROMPT)
        assert hooks_of(model) == before

    def test_removing_twice_is_harmless(self) -> None:
        model = model_of("llama")
        before = hooks_of(model)
        handles = attach_taps(model, ENDS, print)
        assert isinstance(handles, TapHandles)
        handles.remove()
        handles.remove()
        assert hooks_of(model) == before

    def test_looking_for_the_middle_draws_no_random_numbers_and_keeps_modes(self) -> None:
        model = tiny("gpt2")  # drops out in training
        model.train()
        model.transformer.h[1].eval()
        modes = [module.training for module in model.modules()]
        state = torch.get_rng_state()
        attach_taps(model, MIDDLES, print).remove()
        assert torch.equal(torch.get_rng_state(), state)
        assert [module.training for module in model.modules()] == modes

    def test_looking_for_the_middle_builds_no_graph(self) -> None:
        model = Toy()
        grad: list[bool] = []
        model.embed.register_forward_hook(lambda *_: grad.append(torch.is_grad_enabled()))
        attach_taps(model, [Tap(0, "resid_mid")], print).remove()
        assert grad == [False]

    def test_second_monitor_does_not_disturb_the_first(self) -> None:
        model = tiny("llama")
        first: list[Tap] = []
        second: list[Tap] = []
        outer = attach_taps(model, ENDS + MIDDLES, lambda tap, hidden: first.append(tap))
        other = model.model.layers[0].register_forward_hook(lambda *_: None)  # after the first's
        before = hooks_of(model)
        with attach_taps(model, MIDDLES, lambda tap, hidden: second.append(tap)):
            assert first == []  # the tokens that look for the middle are nobody's
            model(input_ids=PROMPT)
            assert sorted(first) == sorted(ENDS + MIDDLES)
            assert second == MIDDLES
        assert hooks_of(model) == before
        other.remove()
        outer.remove()
        assert not any(hooks_of(model))

    def test_hooks_that_the_model_installs_meanwhile_stay(self) -> None:
        # transformers hooks its layers once, in the first forward pass that asks for hidden states.
        model = tiny("llama")
        model.config.output_hidden_states = True
        model.model.config.output_hidden_states = True
        with attach_taps(model, ENDS, lambda tap, hidden: None):
            attach_taps(model, MIDDLES, print).remove()
        assert len(model(input_ids=PROMPT).hidden_states) == LAYERS + 1

    def test_nothing_outlives_the_taps(self) -> None:
        class Reader:
            def __init__(self) -> None:
                self.seen: list[weakref.ref[Tensor]] = []

            def __call__(self, tap: Tap, hidden: Tensor) -> None:
                self.seen.append(weakref.ref(hidden))

        model, reader = tiny("llama"), Reader()
        seen = reader.seen
        with torch.no_grad(), attach_taps(model, ENDS + MIDDLES, reader) as handles:
            model(input_ids=PROMPT)
        assert len(seen) == len(ENDS + MIDDLES)
        gone = [weakref.ref(reader), weakref.ref(model), *seen]
        del reader
        gc.collect()
        assert gone[0]() is None  # though model and handles live on
        del model
        gc.collect()
        assert not any(ref() is not None for ref in gone)
        handles.remove()


class TestWhatReadersGet:
    def test_the_tensor_itself(self) -> None:
        model = model_of("llama")
        seen: dict[Tap, Tensor] = {}
        with attach_taps(model, ENDS + MIDDLES, seen.__setitem__):
            model(input_ids=PROMPT)
        for layer in range(1, LAYERS):
            assert seen[Tap(layer, "resid_pre")] is seen[Tap(layer - 1, "resid_post")]
        given: list[Tensor] = []
        norm = model.model.layers[1].post_attention_layernorm
        hook = norm.register_forward_pre_hook(lambda module, args: given.append(args[0]))
        with attach_taps(model, [Tap(1, "resid_mid")], seen.__setitem__):
            given.clear()
            model(input_ids=PROMPT)
        hook.remove()
        assert seen[Tap(1, "resid_mid")] is given[0]
        assert given[0].requires_grad

    def test_inference_mode(self) -> None:
        model = model_of("olmo2")
        with torch.inference_mode():
            seen = read_once(model, ENDS + MIDDLES)
        bare = read_once(model, ENDS + MIDDLES)
        assert all(torch.equal(seen[tap], bare[tap]) for tap in seen)

    @pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "bert"])
    def test_every_fed_token_of_a_generation_once(self, name: str) -> None:
        check_generation(name)

    def test_static_cache(self) -> None:
        check_generation("llama", cache_implementation="static")


def check_generation(name: str, **options: Any) -> None:
    model = model_of(name)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, **options}
    # Left padding is not the point here, but the mask keeps generate from guessing one.
    inputs = {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT)}
    taps = [Tap(1, "resid_pre"), Tap(1, "resid_post")]
    if name in BRANCHES and name not in SEQUENTIAL:
        taps.append(Tap(1, "resid_mid"))
    unmonitored = model.generate(**inputs, **settings)
    seen: dict[Tap, list[Tensor]] = {tap: [] for tap in taps}
    with attach_taps(model, taps, lambda tap, hidden: seen[tap].append(hidden.clone())):
        tokens = model.generate(**inputs, **settings)
    assert torch.equal(tokens, unmonitored)
    d = hidden_size(model)
    whole = read_once(model, taps, input_ids=tokens[:, :-1])  # the last token is never fed
    for tap in taps:
        assert [tuple(hidden.shape) for hidden in seen[tap]] == [(2, 9, d)] + 3 * [(2, 1, d)]
        torch.testing.assert_close(torch.cat(seen[tap], 1), whole[tap], rtol=1e-4, atol=1e-4)
