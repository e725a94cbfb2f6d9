"""A server whose layers are compiled, hooks and all."""

from __future__ import annotations

from serving import Server, ask_all, assert_as_reference, references


def test_halts_where_the_hugging_face_engine_does(tmp_path):
    asked = references(48)
    with Server(tmp_path, eager=False) as running:
        assert_as_reference(asked, ask_all(running, asked))
        assert running.idle_status()["unscored"] == 0
