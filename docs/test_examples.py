"""The examples of the pages, of the README and of docstrings do what they show."""

from __future__ import annotations

import doctest
import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import tokenizers
import torch
import transformers
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

import relprop
from relprop.composites import COMPOSITES
from relprop.methods import METHODS

ROOT = Path(__file__).parents[1]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
PAGES = [path for path in sorted((ROOT / "docs").rglob("*.md")) if "```python" in path.read_text(encoding="utf-8")]
MODULES = [path for path in sorted((ROOT / "relprop").rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]

pytestmark = pytest.mark.filterwarnings("ignore")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_page(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of `python` run one after the other; those of other packages' code are `py`, and only shown."""
    monkeypatch.chdir(tmp_path)  # where they write
    document = Sybil([PythonCodeBlockParser(doctest_optionflags=FLAGS)]).parse(path)
    for example in document.examples():
        example.evaluate()


def decoder() -> torch.nn.Module:
    ends = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config = transformers.GPT2Config(vocab_size=61, n_positions=80, n_embd=32, n_layer=2, n_head=4, **ends)
    return transformers.GPT2LMHeadModel(config).eval()


def of_two_sequences() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A model of text and image, and a question."""
    sizes = dict(hidden_size=32, num_attention_heads=4, intermediate_size=48, visual_feat_dim=16)
    config = transformers.LxmertConfig(vocab_size=61, l_layers=2, x_layers=2, r_layers=2, **sizes)
    regions = {"visual_feats": torch.randn(1, 6, 16), "visual_pos": torch.rand(1, 6, 4)}
    model = transformers.LxmertForQuestionAnswering(config).eval()
    return model, {"input_ids": torch.tensor([[1, 7, 9, 2]]), **regions}


def of_the_reader() -> dict[str, Any]:
    """Names that the README's blocks take from their reader."""
    words = ["[PAD]", "[UNK]", "never", "dull", *(f"word{i}" for i in range(4, 61))]
    known = {word: i for i, word in enumerate(words)}
    whole = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="[UNK]"))
    whole.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    classifier = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=61, **sizes)).eval()
    vqa, question = of_two_sequences()
    return {
        "writer": decoder(),
        "prompt_ids": torch.tensor([[1, 15, 7, 33]]),
        "encode": torch.relu,
        "decoder": torch.randn(48, 48),
        "class_names": [f"class {i}" for i in range(1000)],
        "classifier": classifier,
        "tokenizer": transformers.PreTrainedTokenizerFast(
            tokenizer_object=whole,
            pad_token="[PAD]",
            unk_token="[UNK]",
            model_input_names=["input_ids", "attention_mask"],
        ),
        "texts": ["never dull", "dull"],
        "vqa": vqa,
        "question": question,
    }


def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks as they are, with small models of random weights where it loads trained ones."""
    vision = timm.create_model("vit_tiny_patch16_224", pretrained=False, depth=6, embed_dim=48).eval()
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: vision)
    monkeypatch.chdir(tmp_path)
    names = of_the_reader()
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) >= 5
    for block in blocks:
        if "other" in block:
            names["other"] = relprop.explain(vision, names["images"], target=[[281, 207]] * 4, method="attnlrp")
        exec(compile(block, "README.md", "exec"), names)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_docstrings(path: Path) -> None:
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    found = doctest.testmod(module, optionflags=FLAGS)
    assert found.attempted and not found.failed


def test_reference_has_every_public_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert [name for name in relprop.__all__ if not re.search(rf":: relprop\.(\w+\.)?{name}\b", text)] == []


def test_every_method_has_its_part() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^```{method-card} (\w+)$", text, re.MULTILINE)) == sorted(METHODS)


def test_every_composite_has_its_line() -> None:
    rules = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8").split("\n## Rules\n")[1].split("\n## ")[0]
    named = [
        name for line in re.findall(r"^- (`[^:]+`):", rules, re.MULTILINE) for name in re.findall(r"`(\w+)`", line)
    ]
    assert sorted(named) == sorted(COMPOSITES)


def test_notebook_has_no_outputs() -> None:
    cells = json.loads((ROOT / "notebooks" / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in cells)


def test_citation_names_this_version() -> None:
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {relprop.__version__}\n" in text
