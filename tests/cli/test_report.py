"""`--report` and `--text`: pages and coloured texts from the command line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from relprop.cli import main
from relprop.methods import METHODS

transformers = pytest.importorskip("transformers")
Capture = pytest.CaptureFixture[str]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "film", "that", "is", "never", "dull", "em", "##bed", "##ding", "."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small classifier with its tokenizer, as `save_pretrained` leaves it."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    config.num_labels, config.id2label = 3, {0: "bad", 1: "fair", 2: "good"}
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("digits")
class TestImages:
    def test_one_page_about_all(self, image: Path, tmp_path: Path, capsys: Capture) -> None:
        bad = tmp_path / "bad.png"
        bad.write_text("no image")
        file = tmp_path / "deep" / "out.html"
        arguments = [str(image), str(bad), "--report", str(file), "--batch-size", "1"]
        assert main(["explain", *arguments]) == 1
        out, err = capsys.readouterr()
        assert out == f"{file}\n"
        assert f"relprop: error: {bad}: expected an image" in err and "1 of 2 could not be explained" in err
        page = file.read_text()
        assert re.findall(r"<h3>Relevance for (.*?)</h3>", page) == ["7", "3"]  # the digits that are present
        for name in METHODS:
            assert page.count(f"<figcaption>{name}<small>") == 2
        assert "Every method supports this model." in page and "Ledger of transformer_attribution for 7" in page
        assert [path.name for path in file.parent.iterdir()] == ["out.html"]

    def test_images_beside_the_page_are_explained(
        self, image: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The page's folder may be one of those that are searched."""
        monkeypatch.setattr("relprop.survey.METHODS", {"attnlrp": METHODS["attnlrp"]})
        cats = tmp_path / "photos" / "cats"
        cats.mkdir(parents=True)
        image.rename(cats / "tom.png")
        assert main(["explain", str(tmp_path / "photos"), "--report", str(cats / "page.html")]) == 0
        assert "<h2>tom.png</h2>" in (cats / "page.html").read_text()

    def test_nothing_could_be_read(self, tmp_path: Path, capsys: Capture) -> None:
        bad = tmp_path / "bad.png"
        bad.write_text("no image")
        assert main(["explain", str(bad), "--report", str(tmp_path / "out.html")]) == 1
        assert capsys.readouterr().err.endswith("relprop: 1 of 1 could not be explained\n")
        assert not (tmp_path / "out.html").exists()


@pytest.mark.filterwarnings("ignore")
class TestTexts:
    def test_in_the_terminal(self, folder: Path, capsys: Capture) -> None:
        arguments = ["--text", "a film that is never embedding.", "--text", "dull", "--model", str(folder)]
        assert main(["explain", *arguments, "--target", "good", "--method", "attnlrp"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert re.fullmatch(r"good\tp=0\.\d{4}", lines[0]) and re.fullmatch(r"good\tp=0\.\d{4}", lines[3])
        assert lines[1] == "[CLS] a film that is never embedding. [SEP]" and lines[4] == "[CLS] dull [SEP]"

    @pytest.mark.parametrize("problem", [None, "regression"])
    def test_one_logit(self, folder: Path, tmp_path: Path, capsys: Capture, problem: str | None) -> None:
        """A probability by the sigmoid, or what a regression says, as transformers' own pipeline has it."""
        tokenizer = transformers.BertTokenizer.from_pretrained(folder)
        tokenizer.save_pretrained(tmp_path)
        config = transformers.BertConfig.from_pretrained(folder)
        config.num_labels, config.problem_type = 1, problem
        torch.manual_seed(0)
        transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
        expected = transformers.pipeline("text-classification", str(tmp_path))("a film")[0]["score"]
        assert main(["explain", "--text", "a film", "--model", str(tmp_path), "--method", "attnlrp"]) == 0
        title = capsys.readouterr().out.splitlines()[0]
        assert title == f"LABEL_0\t{'score' if problem else 'p'}={expected:.4f}" and 0 < abs(expected) < 1

    def test_page(self, folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
        quick = {name: METHODS[name] for name in ("attnlrp", "transformer_attribution")}
        monkeypatch.setattr("relprop.survey.METHODS", quick)
        file = tmp_path / "out.html"
        arguments = ["--text", "a film", "--text", "never dull.", "--model", str(folder), "--target", "top:2"]
        assert main(["explain", *arguments, "--report", str(file)]) == 0
        assert capsys.readouterr().out == f"{file}\n"
        page = file.read_text()
        assert re.findall(r"<h2>(.*?)</h2>", page)[:2] == ["a film", "never dull."]
        titles = re.findall(r"<figcaption><span>(.*?)</span>", page)
        assert titles == ["attnlrp", "transformer_attribution"] * 4
        assert page.count(">dull</span>") == 4 and "[PAD]" not in page

    @pytest.mark.parametrize("to_page", [False, True])
    def test_name_with_an_owner(
        self, folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, to_page: bool
    ) -> None:
        """owner/name is asked of transformers, which looks in its cache and on the hub."""
        monkeypatch.setattr("relprop.survey.METHODS", {"attnlrp": METHODS["attnlrp"]})
        name, asked = "textattack/bert-base-uncased-SST-2", []
        for kind in (transformers.AutoTokenizer, transformers.AutoModelForSequenceClassification):

            def load(model: str, own: Any = kind.from_pretrained, **options: Any) -> Any:
                asked.append(model)
                return own(folder, **options)

            monkeypatch.setattr(kind, "from_pretrained", load)
        file = tmp_path / "out.html"
        arguments = ["--text", "Never dull.", "--model", name, "--method", "attnlrp"]
        assert main(["explain", *arguments, *(["--report", str(file)] if to_page else [])]) == 0
        assert asked == [name, name]
        out = capsys.readouterr().out
        assert out == f"{file}\n" if to_page else "[CLS] never dull. [SEP]" in out
        assert not to_page or f"<h1>relprop: {name}</h1>" in file.read_text()

    def test_what_cannot_be_loaded(self, folder: Path, tmp_path: Path, capsys: Capture) -> None:
        def failure(model: Path, *more: str) -> str:
            assert main(["explain", "--text", "a", "--model", str(model), *more]) == 1
            return capsys.readouterr().err

        assert "got no folder" in failure(tmp_path / "missing")
        assert "expected a text classifier with its tokenizer" in failure(tmp_path)
        config = transformers.BertConfig(
            vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
        )
        transformers.BertModel(config).save_pretrained(tmp_path / "bare")
        transformers.BertTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "bare")
        assert "got none for classifier.bias, classifier.weight" in failure(tmp_path / "bare")
        assert "expected a label, a number from 0 to 2 or top:K, got 'godo'; did you mean 'good' (2)?" in failure(
            folder, "--target", "godo"
        )
        assert "device: expected one that torch can use here" in failure(folder, "--device", "nowhere")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected images or --text, got neither"),
        (["a.png", "--text", "b", "--model", "m"], "expected images or --text, got both"),
        (["--text", "b"], "--text: expected the --model that reads it"),
        (["--text", "b", "--model", "m", "--check"], "--check: not together with --text"),
        (["--text", "b", "--model", "m", "--image-size", "64"], "--image-size: not together with --text"),
        (["--text", "b", "--model", "m", "--out", "o"], "--out: not together with --text"),
        (["a.png", "--report", "o.html", "--out", "o"], "--out: not together with --report"),
        (["a.png", "--report", "out.png"], "--report: expected a name that ends in .html, got out.png"),
        (["a.png", "--report", "o.html", "--composite", "gamma"], "--composite: not together with --report"),
        (["a.png", "--report", "o.html", "--option", "a=1"], "--option: not together with --report"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["explain", *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_folder_in_place_of_a_page(image: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "out.html").mkdir()
    assert main(["explain", str(image), "--report", str(tmp_path / "out.html")]) == 1
    assert "expected the name of a page to write, got a folder" in capsys.readouterr().err


def test_the_bundled_model_is_for_images(capsys: Capture, folder: Path) -> None:
    """A method that is unknown is said before a model is loaded."""
    arguments: list[Any] = ["--text", "a", "--model", str(folder), "--method", "attnlpr"]
    assert main(["explain", *arguments]) == 1
    assert "did you mean 'attnlrp'?" in capsys.readouterr().err
