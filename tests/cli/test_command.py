"""The command as a whole: what it writes, prints and returns."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

import relprop
from relprop.cli import guarded, main
from relprop.cli.explain import output_names, parse_options, stack_targets
from relprop.demo.model import preprocess
from relprop.errors import OptionError
from relprop.images import load_image
from relprop.pictures import enlarge, overlay

ROOT = Path(relprop.__file__).parents[1]
Capture = pytest.CaptureFixture[str]


def rows(out: str) -> list[list[str]]:
    return [line.split("\t") for line in out.splitlines()]


@pytest.mark.usefixtures("digits")
class TestExplain:
    def test_every_digit_present_by_default(
        self, image: Path, tmp_path: Path, capsys: Capture, digits: VisionTransformer
    ) -> None:
        assert main(["explain", str(image), "--out", str(tmp_path / "out")]) == 0
        out, err = capsys.readouterr()
        logits = digits(preprocess(load_image(image))[None])[0].detach()
        assert err == ""
        assert rows(out) == [
            [str(image), str(d), f"p={float(logits[d].sigmoid()):.4f}", str(tmp_path / "out" / f"scan.{d}.png")]
            for d in (7, 3)
        ]
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["scan.3.png", "scan.7.png"]

    def test_overlay_is_the_explanation_beside_the_image(
        self, image: Path, tmp_path: Path, digits: VisionTransformer
    ) -> None:
        assert main(["explain", str(image), "--target", "3", "--out", str(tmp_path)]) == 0
        drawn = np.asarray(load_image(tmp_path / "scan.3.png"))
        inputs = preprocess(load_image(image))[None]
        heat = relprop.explain(digits, inputs, target=3).image_map()[0]
        seen = enlarge(load_image(image), 320)
        above = drawn.shape[0] - 320 - 8
        assert np.array_equal(drawn[above : above + 320, 8:328], np.asarray(seen))
        painted = np.asarray(overlay(seen, heat)).astype(int)
        # Alone or in a batch of targets the engine rounds differently: a step of a colour at most.
        assert np.abs(drawn[above : above + 320, 336:656].astype(int) - painted).max() <= 2

    def test_top_2_of_a_folder_in_batches(self, tmp_path: Path, capsys: Capture, image: Path) -> None:
        folder, out = tmp_path / "in", tmp_path / "in" / "out"
        (folder / "deeper").mkdir(parents=True)
        for name in ("a.png", "b.jpg", "deeper/a.webp"):
            load_image(image).save(folder / name)
        for _ in range(2):  # the second time the output folder holds pictures, which are not explained
            assert main(["explain", str(folder), "--target", "top:2", "--batch-size", "2", "--out", str(out)]) == 0
            printed = rows(capsys.readouterr().out)
            assert [(Path(file).name, label) for file, label, *_ in printed] == [
                (name, label) for name in ("a.png", "b.jpg", "a.webp") for label in ("7", "3")
            ]
            assert sorted(p.name for p in out.iterdir()) == sorted(Path(row[3]).name for row in printed)
            assert {p.name.split(".7")[0] for p in out.glob("*.7.png")} == {"a.png", "b", "a.webp"}

    def test_bad_images_are_reported_and_the_good_ones_explained(
        self, image: Path, tmp_path: Path, capsys: Capture
    ) -> None:
        text, cut, empty = tmp_path / "text.png", tmp_path / "cut.jpg", tmp_path / "empty"
        text.write_text("no image")
        load_image(image).save(cut)
        cut.write_bytes(cut.read_bytes()[:-500])
        empty.mkdir()
        missing = tmp_path / "missing.png"
        paths = map(str, (text, image, cut, empty, missing))
        assert main(["explain", *paths, "--out", str(tmp_path / "out")]) == 1
        out, err = capsys.readouterr()
        assert [row[0] for row in rows(out)] == [str(image)] * 2
        assert err.splitlines() == [
            f"relprop: error: {empty}: expected a folder with images (.jpg, .jpeg, .png, .webp), got one without any",
            f"relprop: error: {text}: expected an image, got a file of unknown format or without pixels, which begins"
            " with b'no image'",
            *[line for line in err.splitlines() if f"error: {cut}: expected a readable, complete image" in line],
            f"relprop: error: {missing}: expected an image file, got no such file",
            "relprop: 4 of 5 could not be explained",
        ]
        assert len(err.splitlines()) == 5

    def test_nothing_to_explain(self, tmp_path: Path, capsys: Capture) -> None:
        (tmp_path / "empty").mkdir()
        assert main(["explain", str(tmp_path / "empty"), "--out", str(tmp_path / "out")]) == 1
        assert capsys.readouterr().err.endswith("relprop: 1 of 1 could not be explained\n")

    def test_no_digit_present(self, image: Path, tmp_path: Path, capsys: Capture, digits: VisionTransformer) -> None:
        bias = digits.head.bias.detach().clone()
        try:
            with torch.no_grad():
                digits.head.bias -= 5
            assert main(["explain", str(image), "--out", str(tmp_path)]) == 0
        finally:
            with torch.no_grad():
                digits.head.bias.copy_(bias)
        out, err = capsys.readouterr()
        assert [row[1] for row in rows(out)] == ["7"]
        assert err == f"relprop: note: {image}: no class with p > 0.5, explaining the likeliest\n"

    def test_check_adds_a_column(self, image: Path, tmp_path: Path, capsys: Capture) -> None:
        assert main(["explain", str(image), "--check", "--out", str(tmp_path)]) == 0
        for row in rows(capsys.readouterr().out):
            assert re.fullmatch(r"(un)?stable, disagreement \d\.\de-\d\d", row[4])

    def test_a_method_that_knows_no_class(self, image: Path, tmp_path: Path, capsys: Capture) -> None:
        arguments = ["--method", "attention_rollout", "--target", "3", "--option", "start_layer=1"]
        assert main(["explain", str(image), *arguments, "--out", str(tmp_path)]) == 0
        out, err = capsys.readouterr()
        assert rows(out) == [[str(image), "any class", "-", str(tmp_path / "scan.any_class.png")]]
        assert err == "relprop: note: attention_rollout is the same for every class; --target is not used\n"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--method", "transformer_attributoin"], "did you mean 'transformer_attribution'?"),
            (["--composite", "cheffer"], "did you mean 'chefer'?"),
            (["--backend", "cp"], "did you mean 'cpp'?"),
            (
                ["--option", "begin=1"],
                "method_options of transformer_attribution: expected count_padding, normalise, read_tokens",
            ),
            (["--option", "start_layer"], "option: expected NAME=VALUE, got 'start_layer'"),
            (["--target", "eleven"], "target: expected a label, a number from 0 to 9 or top:K, got 'eleven'"),
            (["--model", "vit_tinny_patch16_224"], "did you mean 'vit_tiny_patch16_224'?"),
            (["--weights", "no.safetensors"], "no.safetensors: expected a safetensors file, got no such file"),
        ],
    )
    def test_errors(self, image: Path, tmp_path: Path, capsys: Capture, arguments: list[str], message: str) -> None:
        assert main(["explain", str(image), "--out", str(tmp_path / "out"), *arguments]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("relprop: error: ") and message in err and len(err.splitlines()) == 1

    @pytest.mark.parametrize("below", ["", "below"])
    def test_output_is_a_file(self, image: Path, tmp_path: Path, capsys: Capture, below: str) -> None:
        assert main(["explain", str(image), "--out", str(image / below)]) == 1
        text = f"relprop: error: {image / below}: expected a folder to write to, got {image}, which is a file\n"
        assert capsys.readouterr().err == text

    def test_without_the_extra(
        self, image: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        assert main(["explain", str(image), "--out", str(tmp_path / "out")]) == 1
        assert "install it with: pip install 'relprop[images]'" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_debug_shows_the_traceback(self, image: Path, tmp_path: Path, capsys: Capture) -> None:
        main(["explain", str(image), "--debug", "--method", "nonsense", "--out", str(tmp_path)])
        assert "Traceback (most recent call last)" in capsys.readouterr().err

    def test_a_map_with_nan_fails_alone(
        self, image: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(relprop.Explanation, "image_map", lambda self: torch.full((1, 2, 64, 64), torch.nan))
        assert main(["explain", str(image), "--out", str(tmp_path / "out")]) == 1
        text = f"relprop: error: {image}: map: expected finite numbers, got 4096 NaN or infinite of 4096\n"
        assert capsys.readouterr().err.startswith(text)
        assert not list((tmp_path / "out").iterdir())


def test_timm_model_from_a_file(image: Path, tmp_path: Path, capsys: Capture) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit")
    file = tmp_path / "tiny.safetensors"
    save_file(model.state_dict(), file)
    where = ["--model", str(file), "--arch", "test_vit", "--out", str(tmp_path)]
    assert main(["explain", str(image), *where, "--target", "tabby", "--method", "full"]) == 0
    (row,) = rows(capsys.readouterr().out)
    assert row[1] == "tabby" and row[3] == str(tmp_path / "scan.281_tabby.png")
    assert load_image(row[3]).size == (3 * 8 + 2 * 320, 2 * 8 + 19 + 320)


class TestUsage:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "the following arguments are required: command"),
            (["explain"], "expected images or --text, got neither"),
            (["explain", "a.png", "--batch-size", "0"], "expected a whole number from 1, got '0'"),
            (["explain", "a.png", "--batch-size", "x"], "expected a whole number from 1, got 'x'"),
            (["explain", "a.png", "--model", "w.safetensors"], "a file of weights needs --arch"),
            (["explain", "a.png", "--arch", "vit_tiny_patch16_224"], "--arch: only together with a --model that is a"),
            (["explain", "a.png", "--image-size", "32"], "--image-size: only together with --model"),
            (
                ["explain", "a.png", "--model", "w.safetensors", "--arch", "a", "--weights", "v.safetensors"],
                "--weights: not together with a --model that is a file",
            ),
            (["explian"], "invalid choice: 'explian'"),
        ],
    )
    def test_wrong_usage_is_2(self, capsys: Capture, arguments: list[str], message: str) -> None:
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2 and message in capsys.readouterr().err

    def test_version_and_help(self, capsys: Capture) -> None:
        for argument, text in (("--version", f"relprop {relprop.__version__}\n"), ("--help", "examples:")):
            with pytest.raises(SystemExit) as stopped:
                main([argument])
            assert stopped.value.code == 0 and text in capsys.readouterr().out

    def test_interrupted_is_130(self, capsys: Capture) -> None:
        def interrupted() -> int:
            raise KeyboardInterrupt

        assert guarded(interrupted) == 130
        assert capsys.readouterr().err == "relprop: interrupted\n"

    def test_faults_of_our_own_are_not_hidden(self) -> None:
        with pytest.raises(ZeroDivisionError):
            guarded(lambda: 1 // 0)

    @pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
    def test_broken_pipe_is_quiet(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "relprop", "methods"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == b"" and process.wait() == 141

    def test_error_as_a_process(self, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "relprop", "explain", "a.png", "--method", "nonsense"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith("relprop: error: unknown method: expected one of ")


class TestTables:
    def test_info(self, capsys: Capture) -> None:
        assert main(["info"]) == 0
        out = capsys.readouterr().out
        for name in ("python", "relprop", "torch", "timm", "platform", "CPU", "CUDA kernels", *relprop.backends()):
            assert re.search(rf"^  {re.escape(name)}  ", out, re.M), name
        assert torch.__version__.split("+")[0] in out

    def test_info_says_why_a_backend_is_not_there(self, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("relprop.native.info", lambda: {"available": False, "reason": "not built"})
        monkeypatch.setattr("relprop.info.backends", lambda: {"torch": "available", "cpp": "unavailable: not built"})
        main(["info"])
        out = capsys.readouterr().out
        assert re.search(r"^  cpp +unavailable: not built$", out, re.M)
        assert re.search(r"^  CUDA kernels +not built: there are no compiled kernels at all$", out, re.M)

    @pytest.mark.parametrize("columns", [60, 120])
    def test_methods(self, capsys: Capture, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
        monkeypatch.setattr(shutil, "get_terminal_size", lambda *_, **__: os.terminal_size((columns, 24)))
        assert main(["methods"]) == 0
        out = capsys.readouterr().out
        assert all(re.search(rf"^  {name} ", out, re.M) for name in (*relprop.methods(), *relprop.composites()))
        assert max(map(len, out.splitlines())) <= columns
        words = " ".join(out.split())
        assert "options: start_layer=0, normalise=False, read_tokens=kept" in words
        assert "composite: chefer Chefer et al., CVPR 2021, eq. 13-14" in words


def test_output_names(tmp_path: Path) -> None:
    paths = ["a/cat.jpg", "b/cat.jpg", "b/cat.png", "dog.jpg", "c/Dog.jpg", "c/" + "x" * 200 + ".png"]
    names = output_names([tmp_path / path for path in paths])
    assert names == ["a_cat.jpg", "b_cat.jpg", "cat.png", f"{tmp_path.name}_dog.jpg", "c_Dog.jpg", "x" * 80]


def test_parse_options() -> None:
    given = ["a=1", "b=-0.5", "c=true", "d=False", "e=text", "f=x=y"]
    assert parse_options(given) == {"a": 1, "b": -0.5, "c": True, "d": False, "e": "text", "f": "x=y"}
    with pytest.raises(OptionError, match="option: expected NAME=VALUE, got '=1'"):
        parse_options(["=1"])


def test_stack_targets() -> None:
    assert stack_targets([[4, 2], [7]]).tolist() == [[4, 2], [7, 7]]
