"""The model in the package: it loads, writes the language, and is rebuilt the same."""

import json

import numpy as np
import pytest
import torch

from midstream import testbed
from midstream.testbed import grammar
from midstream.testbed.tokenizer import build_tokenizer
from midstream.testbed.train import build_model


@pytest.fixture(scope="module")
def loaded():
    return testbed.load()


@pytest.fixture(scope="module")
def prompts():
    return [testbed.sample_prompt(77, index) for index in range(120)]


@pytest.fixture(scope="module")
def responses(loaded, prompts):
    return testbed.generate_responses(loaded[0], prompts, seed=77)


def template_ids(tokenizer, messages):
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


def test_tokenizer_renders_what_the_sampler_writes():
    tokenizer = build_tokenizer()
    for index in range(200):
        dialogue = testbed.sample_dialogue(1, index)
        assert template_ids(tokenizer, dialogue.prompt.messages) == dialogue.prompt.ids
        text = tokenizer.decode(dialogue.response, skip_special_tokens=True)
        assert text == testbed.text_of(dialogue.response)
        again = tokenizer(text, add_special_tokens=False).input_ids
        assert tuple(again) == dialogue.response[:-1]


@pytest.mark.parametrize(
    "text",
    ["Open the amber jar.", "open the amber jar .", "  OPEN  the\namber jar  . "],
)
def test_tokenizer_takes_text_as_people_write_it(text):
    ids = build_tokenizer()(text, add_special_tokens=False).input_ids
    assert [grammar.VOCABULARY[token] for token in ids] == ["open", "the", "amber", "jar", "."]


def test_tokenizer_odd_text():
    tokenizer = build_tokenizer()
    unknown = grammar.TOKEN_ID[grammar.UNKNOWN]
    assert tokenizer("", add_special_tokens=False).input_ids == []
    assert tokenizer("zebra", add_special_tokens=False).input_ids == [unknown]
    stops = tokenizer("jar...", add_special_tokens=False).input_ids[1:]
    assert stops == [grammar.TOKEN_ID["."]] * 3
    assert tokenizer.padding_side == "left"
    assert tokenizer.convert_tokens_to_ids(grammar.HALT) == grammar.TOKEN_ID[grammar.HALT]


def test_finished_turns_end_with_eos():
    tokenizer = build_tokenizer()
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "sorry ."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<bos><user>hello<assistant>sorry .<eos>"


def test_files_in_the_package():
    names = {path.name for path in testbed.MODEL_DIR.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pkl", ".py")) for name in names)
    assert (testbed.MODEL_DIR / "model.safetensors").stat().st_size <= 8 * 2**20
    vocabulary = json.loads((testbed.MODEL_DIR / "tokenizer.json").read_text())["model"]["vocab"]
    words = {place: word.lstrip("\u2581") for word, place in vocabulary.items()}
    assert tuple(words[place] for place in range(len(words))) == grammar.VOCABULARY


def test_missing_model_names_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match="midstream testbed build"):
        testbed.load(tmp_path)


def test_model_writes_the_language(prompts, responses):
    readings = testbed.Oracle().read(prompts, responses)
    tokens = sum(len(response) for response in responses)
    assert sum(reading.off_grammar for reading in readings) / tokens < 0.01
    violates = np.array([
        testbed.label(prompt, response).violates
        for prompt, response in zip(prompts, responses, strict=True)
    ])  # fmt: skip
    # the grammar's rate is 0.33; three standard errors of 120 streams are 0.13
    assert 0.20 < violates.mean() < 0.46
    halt = grammar.TOKEN_ID[grammar.HALT]
    assert not any(halt in response for response in responses)


def test_model_calls_vessels_by_their_names(prompts, responses):
    """It knows what is sealed and what was opened: the right noun follows from that alone."""
    nouns = {grammar.TOKEN_ID[noun]: noun for noun in grammar.NOUNS}
    right = {True: [], False: []}
    for prompt, response in zip(prompts, responses, strict=True):
        sealed = grammar.TOKEN_ID[prompt.sealed]
        first = testbed.label(prompt, response).first
        for at, token in enumerate(response):
            if token in nouns and at > 0:
                shut = response[at - 1] == sealed and not 0 <= first < at
                right[shut].append((nouns[token] == prompt.noun) == shut)
    for kind in right.values():
        assert len(kind) > 50
        assert np.mean(kind) > 0.95


def test_model_predicts_nearly_as_well_as_the_grammar_allows(loaded):
    dialogues = [testbed.sample_dialogue(78, index) for index in range(60)]
    readings = testbed.Oracle().read([d.prompt for d in dialogues], [d.response for d in dialogues])
    mine, best, count = 0.0, 0.0, 0
    for dialogue, reading in zip(dialogues, readings, strict=True):
        ids = torch.tensor([[*dialogue.prompt.ids, *dialogue.response]])
        with torch.inference_mode():
            logs = loaded[0](ids).logits[0].log_softmax(-1)
        begin = len(dialogue.prompt.ids)
        targets = ids[0, begin:, None]
        mine -= logs[begin - 1 : -1].gather(1, targets).sum().item()
        best -= reading.log_likelihood.sum()
        count += len(dialogue.response)
    assert mine / count < best / count + 0.02


def test_responses_do_not_depend_on_the_batch(loaded, prompts, responses):
    few = testbed.generate_responses(loaded[0], prompts[:9], seed=77, batch_size=4)
    assert few == responses[:9]
    later = testbed.generate_responses(loaded[0], prompts[5:9], seed=77, first_index=5)
    assert later == responses[5:9]
    other = testbed.generate_responses(loaded[0], prompts[:9], seed=78)
    assert other != few
    cut = testbed.generate_responses(loaded[0], prompts[:9], seed=77, max_new_tokens=5)
    assert cut == [response[:5] for response in few]
    assert testbed.generate_responses(loaded[0], [], seed=0) == []


def test_a_list_of_words_cannot_tell(prompts, responses):
    pytest.importorskip("sklearn")
    half = 60
    baseline = testbed.BagOfWords.fit(prompts[:half], responses[:half], 0)
    wrong = 0
    for prompt, response in zip(prompts[half:], responses[half:], strict=True):
        flagged = baseline.risk(prompt, response)[1:] >= 0.5
        first = int(flagged.argmax()) if flagged.any() else -1
        wrong += first != testbed.label(prompt, response).first
    assert wrong >= 15  # of 60 streams, some 22 violate


def test_build_is_seeded_and_whole(tmp_path):
    seen = []

    def progress(step, steps, loss):
        seen.append((step, steps, np.isfinite(loss)))

    folders = [
        build_model(
            tmp_path / name, seed=seed, steps=2, tokens_per_batch=512, progress=progress
        )
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]  # fmt: skip
    assert seen == [(1, 2, True), (2, 2, True)] * 3
    first, again, other = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert first == again
    assert first != other
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]
    build_model(tmp_path / "a", seed=2, steps=2, tokens_per_batch=512)  # replaces what is there
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == other
    model, tokenizer = testbed.load(tmp_path / "a")
    assert not model.training
    assert tokenizer.eos_token_id == testbed.EOS_ID
