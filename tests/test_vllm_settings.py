"""What the vLLM plugin refuses to start with, and the command line it fills in."""

from __future__ import annotations

import json
from types import SimpleNamespace as Namespace

import pytest
import toy

from midstream.commands.vllm import serve_arguments
from midstream.engines.vllm.checks import check_config, check_version
from midstream.engines.vllm.settings import (
    ANY_VERSION,
    PROCESSOR,
    SCHEDULER,
    WORKER,
    SettingsError,
    UnsupportedEngineError,
    bundle_of,
)


def config(**changes):
    """A configuration that can be watched; ``model__runner_type="pooling"`` changes one part."""
    parts = {
        "model_config": Namespace(
            runner_type="generate",
            is_encoder_decoder=False,
            is_diffusion=False,
            enable_prompt_embeds=False,
            logits_processors=[PROCESSOR],
        ),
        "parallel_config": Namespace(
            pipeline_parallel_size=1,
            prefill_context_parallel_size=1,
            enable_dbo=False,
            enable_batch_sharded_sampling=None,
            worker_cls=WORKER,
        ),
        "scheduler_config": Namespace(policy="fcfs", scheduler_cls=SCHEDULER),
        "speculative_config": None,
        "lora_config": None,
        "kv_transfer_config": None,
        "weight_transfer_config": None,
    }
    for name, value in changes.items():
        part, _, field = name.partition("__")
        if field:
            setattr(parts[f"{part}_config"], field, value)
        else:
            parts[name] = value
    return Namespace(**parts)


def test_the_usual_configuration_is_accepted():
    check_config(config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__runner_type": "pooling"}, "runs as 'pooling'"),
        ({"model__is_encoder_decoder": True}, "encoder-decoder"),
        ({"model__enable_prompt_embeds": True}, "--enable-prompt-embeds"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"lora_config": object()}, "--enable-lora"),
        ({"kv_transfer_config": object()}, "--kv-transfer-config"),
        ({"weight_transfer_config": object()}, "--weight-transfer-config"),
        ({"model__is_diffusion": True}, "a diffusion model"),
        ({"parallel__pipeline_parallel_size": 2}, "pipeline parallel over 2"),
        ({"parallel__prefill_context_parallel_size": 2}, "context parallel over 2"),
        ({"parallel__enable_dbo": True}, "--enable-dbo"),
        ({"parallel__enable_batch_sharded_sampling": True}, "--enable-batch-sharded-sampling"),
        ({"scheduler__policy": "priority"}, "--scheduling-policy priority"),
        ({"scheduler__scheduler_cls": None}, "--scheduler-cls is None"),
        ({"parallel__worker_cls": "other.Worker"}, "--worker-cls is other.Worker"),
        ({"model__logits_processors": None}, "--logits-processors are none"),
        ({"model__logits_processors": [PROCESSOR, "other:P"]}, "could undo a halt"),
    ],
)
def test_what_cannot_be_watched_is_refused(changes, message):
    with pytest.raises(UnsupportedEngineError, match=message):
        check_config(config(**changes))


def test_an_unknown_version_is_refused_unless_forced(monkeypatch):
    check_version("0.32.0+cpu")
    with pytest.raises(UnsupportedEngineError, match=r"vLLM 0\.33\.0.*0\.32\.x.*" + ANY_VERSION):
        check_version("0.33.0")
    monkeypatch.setenv(ANY_VERSION, "1")
    check_version("0.33.0")


def test_the_bundle_is_named_in_the_additional_config(tmp_path):
    bundle = toy.bundle()
    bundle.save(tmp_path / "bundle")
    ours = {"bundle": str(tmp_path / "bundle")}
    assert bundle_of(Namespace(additional_config={"midstream": ours})).hash == bundle.hash
    assert ours["hash"] == bundle.hash  # part of the key of vLLM's compile cache
    with pytest.raises(SettingsError, match="was replaced meanwhile"):
        bundle_of(Namespace(additional_config={"midstream": {**ours, "hash": "0" * 64}}))
    with pytest.raises(SettingsError, match="names no bundle"):
        bundle_of(Namespace(additional_config={}))


def test_serve_fills_in_the_seams_and_passes_the_rest(tmp_path):
    bundle = toy.bundle()
    bundle.save(tmp_path / "bundle")
    rest = ["--port", "9", "--additional-config", '{"mine": 1}', "--enforce-eager"]
    arguments = serve_arguments("MODEL", tmp_path / "bundle", rest)
    assert arguments[:2] == ["serve", "MODEL"]
    given = dict(zip(arguments[2:10:2], arguments[3:10:2], strict=True))
    assert json.loads(given.pop("--additional-config")) == {
        "mine": 1,
        "midstream": {"bundle": str(tmp_path / "bundle"), "hash": bundle.hash},
    }
    assert given == {
        "--worker-cls": WORKER,
        "--scheduler-cls": SCHEDULER,
        "--logits-processors": PROCESSOR,
    }
    assert arguments[10:] == ["--port", "9", "--enforce-eager"]


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        (["--worker-cls", "other.Worker"], "--worker-cls is given"),
        (["--scheduler_cls=other.Scheduler"], "--scheduler-cls is given"),
        (["--additional-config=[1]"], "expected a JSON object"),
        (["--additional-config"], "expected a JSON object"),
    ],
)
def test_serve_refuses_what_takes_its_seams(rest, message, tmp_path):
    toy.bundle().save(tmp_path / "bundle")
    with pytest.raises(SettingsError, match=message):
        serve_arguments("MODEL", tmp_path / "bundle", rest)


def test_serve_refuses_an_environment_without_the_plugin(tmp_path, monkeypatch):
    toy.bundle().save(tmp_path / "bundle")
    monkeypatch.setenv("VLLM_PLUGINS", "other,midstream")
    serve_arguments("MODEL", tmp_path / "bundle", [])
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(SettingsError, match="VLLM_PLUGINS=other leaves midstream's plugin out"):
        serve_arguments("MODEL", tmp_path / "bundle", [])
