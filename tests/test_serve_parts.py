"""Parts of the local engine on their own: sampling, the channel, the text of cut characters."""

from __future__ import annotations

import asyncio
import itertools
import socket
import threading
from typing import Any

import pytest
import serving
import torch
import toy
from hypothesis import given
from hypothesis import strategies as st
from serving import House, answer, ask, text_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from midstream.bank import Probe
from midstream.engines.hf.requests import Text
from midstream.serve.channel import Channel, ChannelProtocol
from midstream.serve.errors import ApiError
from midstream.serve.sampling import Sampling, shape
from midstream.taps import Tap

# -- sampling -------------------------------------------------------------------------------------


def scores(rows: int = 6, vocabulary: int = 40) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(3)) * 3


def kept(row: torch.Tensor) -> set[int]:
    return set(row.isfinite().nonzero().flatten().tolist())


def test_every_row_is_shaped_by_its_own_request() -> None:
    given_scores = scores()
    before = given_scores.clone()
    asked = [
        Sampling(),
        Sampling(temperature=0.0, top_k=7),
        Sampling(temperature=0.5),
        Sampling(top_k=3),
        Sampling(top_p=0.6),
    ]
    shaped = shape(given_scores, asked)
    assert torch.equal(given_scores, before)
    assert torch.equal(shaped[[0, 5]], before[[0, 5]])  # none asked for, and no request
    assert kept(shaped[1]) == {int(before[1].argmax())}
    assert torch.equal(shaped[2], before[2] / 0.5)
    assert kept(shaped[3]) == set(before[3].topk(3).indices.tolist())
    order = before[4].argsort(descending=True)
    needed = int((before[4].softmax(0)[order].cumsum(0) < 0.6).sum()) + 1
    assert kept(shaped[4]) == set(order[:needed].tolist())


def test_of_several_likeliest_tokens_greedy_takes_the_first_as_argmax_does() -> None:
    tied = torch.tensor([[1.0, 5.0, 5.0, 2.0]])
    assert kept(shape(tied, [Sampling(temperature=0.0)])[0]) == {1}


def test_rows_that_ask_for_nothing_are_not_even_copied() -> None:
    given_scores = scores()
    assert shape(given_scores, [Sampling(), Sampling(top_k=40), Sampling(top_k=99)]) is given_scores


def test_the_order_is_that_of_generate() -> None:
    """Temperature, then top-k, then top-p."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    want = scores(1)
    for warper in (TemperatureLogitsWarper(2.0), TopKLogitsWarper(9), TopPLogitsWarper(0.5)):
        want = warper(None, want)
    assert torch.equal(shape(scores(1), [Sampling(2.0, 9, 0.5)]), want)


def test_a_model_has_its_own_sampling_which_a_request_may_replace() -> None:
    config = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9)
    own = Sampling.of(config)
    assert own == Sampling(temperature=0.6, top_p=0.9)
    assert own.with_asked({"temperature": 0, "top_k": 5.0}) == Sampling(0.0, 5, 0.9)
    assert Sampling.of(GenerationConfig(do_sample=False)).temperature == 0.0
    assert Sampling.of(GenerationConfig()) == Sampling()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"temperature": -0.1}, "temperature: expected 0 or more"),
        ({"temperature": float("nan")}, "temperature: expected 0 or more"),
        ({"top_k": -1}, "top_k: expected 0 or more"),
        ({"top_p": 0.0}, "top_p: expected above 0"),
        ({"top_p": 1.5}, "top_p: expected above 0"),
    ],
)
def test_sampling_that_makes_no_sense_is_refused(asked: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling().with_asked(asked)


# -- the channel ----------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=300) | st.text(), max_size=8), st.integers(1, 64))
def test_messages_come_whole_however_they_were_cut(messages: list[Any], part: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for message in messages:
            Channel(ours).send(message)
        ours.shutdown(socket.SHUT_WR)
        wire = b""
        while data := theirs.recv(1 << 16):
            wire += data
    received: list[Any] = []
    protocol = ChannelProtocol(received.append, lambda: None)
    for begin in range(0, len(wire), part):
        protocol.data_received(wire[begin : begin + part])
    assert received == messages


def test_a_large_message_and_many_senders() -> None:
    async def talk() -> list[Any]:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        received: list[Any] = []
        lost = loop.create_future()
        protocol = ChannelProtocol(received.append, lambda: lost.set_result(None))
        await loop.create_unix_connection(lambda: protocol, sock=ours)
        channel = Channel(theirs)

        def echo(sender: int) -> None:
            for number in range(20):
                channel.send((sender, number, "x" * 50_000))

        def other_end() -> None:
            senders = [threading.Thread(target=echo, args=(i,)) for i in range(4)]
            for thread in senders:
                thread.start()
            for thread in senders:
                thread.join()
            for message in channel:  # until the other end hangs up
                channel.send(message)
            theirs.close()

        other = threading.Thread(target=other_end)
        other.start()
        protocol.send("y" * 3_000_000)
        while len(received) < 81:
            await asyncio.sleep(0.001)
        protocol.close()
        await lost
        protocol.send("nobody")
        other.join()
        channel.send("nobody")
        return received

    received = asyncio.run(asyncio.wait_for(talk(), serving.PATIENCE))
    assert received.pop() == "y" * 3_000_000
    for sender in range(4):
        assert [m[1] for m in received if m[0] == sender] == list(range(20))


# -- characters of several tokens -----------------------------------------------------------------

WRITTEN = "é€𝄞x"
"""No byte comes twice in it, so that a model can know by one byte which comes next."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "<eos>"])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def reciting_model(tok: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """After ``a`` it writes `WRITTEN`, byte by byte, greedily."""
    size = len(tok)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=260,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        eos_token_id=tok.eos_token_id,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    chain = [*tok("a" + WRITTEN)["input_ids"], tok.eos_token_id]
    assert len(set(chain)) == len(chain) == 1 + len(WRITTEN.encode()) + 1
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, 260))
        model.lm_head.weight.zero_()
        for this, following in itertools.pairwise(chain):
            model.lm_head.weight[following, this] = 9.0
    model.generation_config.do_sample = False
    return model.eval()


def test_text_comes_in_whole_characters() -> None:
    tok = byte_tokenizer()
    written = Text(tok)
    pieces = [written.add([token]) for token in tok(WRITTEN)["input_ids"]]
    assert [piece for piece in pieces if piece] == list(WRITTEN)
    assert written.rest() == ""
    cut = Text(tok)
    assert cut.add(tok("é€")["input_ids"][:-1]) == "é"
    assert cut.rest() == "\ufffd"


@pytest.fixture(scope="module")
def reciting(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model of our own from folders, without a chat template."""
    folder = tmp_path_factory.mktemp("reciting")
    tok = byte_tokenizer()
    model = reciting_model(tok)
    model.save_pretrained(folder / "reciter")
    tok.save_pretrained(folder / "reciter")
    silent = Probe("silent", "none", Tap(0, "resid_post"), torch.zeros(260), -20.0)
    toy.bundle(model, tok, probes=[silent]).save(folder / "bundle")
    with serving.house(model=folder / "reciter", bundle=folder / "bundle", slots=2) as house:
        yield house


def test_characters_cut_across_tokens_come_out_whole(reciting: House) -> None:
    assert reciting.engine.models == ("reciter",)
    stream, events = reciting.run(answer(reciting.engine, ask(prompt="a", model="reciter")))
    texts = [event.text for event in events if event.type == "released"]
    assert texts == list(WRITTEN)
    assert (stream.prompt_tokens, stream.completion_tokens) == (1, len(WRITTEN.encode()))
    assert (events[-1].message, events[-1].delivered) == ("stop", len(WRITTEN.encode()))


def test_a_character_that_the_limit_cuts_is_told_at_the_end(reciting: House) -> None:
    asked = ask(prompt="a", model="reciter", max_tokens=4)
    stream, events = reciting.run(answer(reciting.engine, asked))
    assert text_of(events) == "é\ufffd"
    assert (stream.completion_tokens, events[-1].message) == (4, "length")


def test_a_chat_without_a_template_is_refused_and_named(reciting: House) -> None:
    with pytest.raises(ApiError, match=r"no chat template.*send a prompt") as refused:
        reciting.run(reciting.engine.submit(ask(0, model="reciter")))
    error = refused.value
    assert (error.status, error.code, error.param) == (400, "no_chat_template", "messages")
