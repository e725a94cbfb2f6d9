"""The worked example of docs/chain.md, run as it stands there."""

import re
from pathlib import Path

import numpy as np

DOCS = Path(__file__).parent.parent / "docs"


def test_the_fixture_gives_what_the_page_says() -> None:
    text = (DOCS / "chain.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    said = re.findall(r"^(chain\.\w+\([^)]*\)) +# (\[[^:\n]*\])", code, re.MULTILINE)
    assert len(said) == 5
    for call, value in said:
        np.testing.assert_allclose(eval(call, names), eval(value), rtol=0, atol=1e-12)
