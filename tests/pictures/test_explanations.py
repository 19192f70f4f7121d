"""`show`, `save` and `_repr_html_` of explanations: the right maps, names and images in the right places."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

import relprop
from relprop.errors import MissingDependencyError, NonFiniteError, OptionError, ShapeError
from relprop.pictures import compare, overlay, text_html
from relprop.pictures.explanations import passages
from relprop.pictures.grids import as_grid, compared_blocks, explanation_blocks
from tests.engine.models import vit

SIDE = 160


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return vit()


def noise(batch: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def tile(picture: Image.Image, column: int, top: int, side: int = SIDE) -> NDArray[np.int64]:
    left = 8 + column * (side + 8)
    return np.asarray(picture).astype(np.int64)[top : top + side, left : left + side]


class TestImages:
    def test_maps_over_the_models_own_input(self, model: nn.Module) -> None:
        x = noise(1)
        found = relprop.explain(model, x, target=[[3, 7]])
        picture = found.picture(side=SIDE)
        top = 8 + 2 * 19  # gap, and two lines of title
        pixels = ((x[0] - x.min()) / (x.max() - x.min()) * 255).round().byte().permute(1, 2, 0).numpy()
        image = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        assert np.abs(tile(picture, 0, top) - np.asarray(image)).max() <= 1
        for target in range(2):
            heat = found.image_map()[0, target]
            expected = overlay(image, heat, limits=(float(heat.min()), float(heat.max())))
            assert np.abs(tile(picture, 1 + target, top) - np.asarray(expected)).max() <= 1
        assert picture.size == (8 + 3 * (SIDE + 8), top + SIDE + 8 + 42)

    def test_normalisation_is_undone(self, model: nn.Module) -> None:
        mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
        colour = torch.tensor([51, 102, 204], dtype=torch.uint8)[:, None, None].expand(3, 32, 32)
        x = (colour / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        found = relprop.explain(model, x[None], target=0)
        assert (tile(found.picture(side=SIDE, normalisation=(mean, std)), 0, 46) == [51, 102, 204]).all()
        assert (tile(found.picture(side=SIDE, images=colour), 0, 46) == [51, 102, 204]).all()
        assert (tile(found.annotated(images=[colour]).picture(side=SIDE), 0, 46) == [51, 102, 204]).all()

    def test_names_and_samples(self, model: nn.Module) -> None:
        found = relprop.explain(model, noise(3), target=[[3, 7], [1, 2], [0, 9]])
        assert found.target_names(1) == ["class 1", "class 2"]
        named = found.annotated(labels=[f"name {i}" for i in range(10)])
        assert named.target_names(2) == ["name 0", "name 9"]
        assert found.annotated(labels={9: "nine"}).target_names(2) == ["class 0", "nine"]
        blocks = explanation_blocks(named, "targets", [2, -3])
        assert [block.heading for block in blocks] == ["sample 2", "sample 0"]
        assert [one.title for one in blocks[0].maps] == ["name 0", "name 9"]
        assert torch.equal(torch.from_numpy(blocks[0].maps[1].values), found.image_map()[2, 1].double())
        assert not blocks[0].maps[0].signed

    def test_one_target_a_callable_and_pixels(self, model: nn.Module) -> None:
        for target, name in ((4, "class 4"), (lambda output: output[:, :3].sum(1), "target")):
            for method, signed in (("transformer_attribution", False), ("attnlrp", True)):
                found = relprop.explain(model, noise(2), target=target, method=method)
                blocks = explanation_blocks(found, "targets", None)
                assert [[one.title for one in block.maps] for block in blocks] == [[name], [name]]
                assert blocks[1].maps[0].signed == signed
                values = torch.from_numpy(blocks[1].maps[0].values)
                assert torch.equal(values, found.image_map()[1].double())

    def test_kept_channels_are_summed(self, model: nn.Module) -> None:
        for target in (4, [[4, 5]]):
            options: dict[str, Any] = {"target": target, "method": "gradient_x_input"}
            kept = relprop.explain(model, noise(1), method_options={"channels": "kept"}, **options)
            summed = relprop.explain(model, noise(1), **options)
            torch.testing.assert_close(kept.target_maps(), summed.target_maps())

    def test_scales(self, model: nn.Module) -> None:
        found = relprop.explain(model, noise(2), target=[[3, 7]] * 2)
        maps = found.image_map()
        image = Image.new("RGB", (SIDE, SIDE), "grey")
        ends = {"map": maps[1, 0], "sample": maps[1], "batch": maps}
        for scale, pool in ends.items():
            picture = found.picture(side=SIDE, images=[image] * 2, scale=scale)
            line = 0 if scale == "batch" else 19  # without the map's own range
            top = 8 + 19 + 8 + 19 + line + SIDE + 8 + 8 + 19 + 8 + 19 + line
            expected = overlay(image, maps[1, 0], limits=(float(pool.min()), float(pool.max())))
            assert np.abs(tile(picture, 1, top) - np.asarray(expected)).max() <= 1, scale

    def test_in_pieces_as_whole(self, model: nn.Module) -> None:
        x = noise(3)
        engine = relprop.compile(model, (x,))
        pieces = engine(x, target=2, batch_size=2)
        assert pieces.image_input() is x
        blocks = explanation_blocks(pieces, "targets", None)
        assert len(blocks) == 3

    def test_layers_and_heads(self, model: nn.Module) -> None:
        latents = ["blocks.?", "blocks.*.attn:heads"]
        found = relprop.explain(model, noise(2), target=[[3, 7]] * 2, method="attnlrp", latents=latents)
        layers = explanation_blocks(found, "layers", [1])
        assert [block.heading for block in layers] == ["class 3", "class 7"]
        # The last block's output is the class token alone.
        assert [one.title for one in layers[1].maps] == ["blocks.0", "blocks.1"]
        values = found.at("blocks.1").per_token()[1, 1, 1:].reshape(4, 4)
        assert torch.equal(torch.from_numpy(layers[1].maps[1].values), values.double())
        heads = explanation_blocks(found, "heads", None)
        assert [block.heading for block in heads[:3]] == [
            "sample 0, class 3, blocks.0.attn",
            "sample 0, class 3, blocks.1.attn",
            "sample 0, class 7, blocks.0.attn",
        ]
        assert [one.title for one in heads[0].maps] == [f"head {i}" for i in range(4)]
        values = found.at("blocks.1.attn:heads").per_token()[0, 0, 2, 1:].reshape(4, 4)
        assert torch.equal(torch.from_numpy(heads[1].maps[2].values), values.double())
        assert found.picture(over="heads", side=32, samples=[0]).width == 8 + 5 * 40
        with pytest.raises(OptionError, match=r"latents=\['blocks.\?'\]"):
            relprop.explain(model, noise(1), target=1).picture(over="layers")

    def test_grids_of_tokens(self) -> None:
        rows = torch.arange(2 * 21.0).reshape(2, 21)
        assert torch.equal(as_grid(rows, (64, 80), "x"), rows[:, 1:].reshape(2, 4, 5))
        plane = torch.zeros(3, 4, 5)
        assert as_grid(plane, (64, 80), "x") is plane
        with pytest.raises(ShapeError, match="x: expected the patches of an image of 64 x 80 pixels, got 11 tokens"):
            as_grid(torch.zeros(1, 11), (64, 80), "x")

    def test_methods_side_by_side(self, model: nn.Module) -> None:
        named = {
            name: relprop.explain(model, noise(2), target=[[3, 7]] * 2, method=name)
            for name in ("transformer_attribution", "full", "attention_rollout")
        }
        named["first target"] = relprop.explain(model, noise(2), target=3)
        blocks = compared_blocks(named, None)
        assert [block.heading for block in blocks] == [
            f"sample {sample}, class {index}" for sample in range(2) for index in (3, 7)
        ]
        assert [(one.title, one.signed) for one in blocks[3].maps] == [
            ("transformer_attribution", False),
            ("full", True),
            ("attention_rollout", False),
            ("first target", False),
        ]
        values = torch.from_numpy(blocks[3].maps[1].values)
        assert torch.equal(values, named["full"].image_map()[1, 1].double())
        picture = compare(named, side=40, samples=[0], heading="methods").image()
        assert picture.width == 8 + 5 * 48
        with pytest.raises(ShapeError, match=re.escape("expected 2 sample(s) with 2 target(s) as in 'a', got 1")):
            compare({"a": named["full"], "b": relprop.explain(model, noise(1), target=3)}).image()
        with pytest.raises(OptionError, match="compare: expected at least one explanation, got none"):
            compare({})

    def test_saved(self, model: nn.Module, tmp_path: Path) -> None:
        found = relprop.explain(model, noise(1), target=1)
        picture = found.save(tmp_path / "a.png", side=SIDE)
        with Image.open(picture) as stored:
            assert np.array_equal(np.asarray(stored), np.asarray(found.picture(side=SIDE)))
        for suffix in ("jpg", "webp"):
            with Image.open(found.save(tmp_path / f"a.{suffix}", side=SIDE)) as stored:
                assert stored.format == {"jpg": "JPEG", "webp": "WEBP"}[suffix]
        page = found.save(tmp_path / "a.html").read_text()
        assert page.startswith("<!doctype html>") and 'src="data:image/png;base64,' in page
        assert found._repr_html_() is not None and "<script" not in page
        with pytest.raises(
            OptionError, match=r"expected a name that ends in .png, .jpg, .jpeg, .webp, .html, got .gif"
        ):
            found.save(tmp_path / "a.gif")

    def test_bad_input(self, model: nn.Module) -> None:
        found = relprop.explain(model, noise(2), target=1)
        with pytest.raises(OptionError, match="over: expected one of targets, layers, heads, got 'tokens'"):
            found.picture(over="tokens")
        with pytest.raises(OptionError, match=re.escape("samples: expected some of 0 to 1, got [2]")):
            found.picture(samples=[2])
        with pytest.raises(ShapeError, match="images: expected 2 for as many samples, got 1"):
            found.picture(images=Image.new("RGB", (8, 8)))
        with pytest.raises(OptionError, match="images: expected PIL images, files or a tensor, got int"):
            found.picture(images=[1, 2])
        with pytest.raises(OptionError, match="images: expected floats from 0 to 1, got"):
            found.picture(images=noise(2))
        with pytest.raises(OptionError, match="images: expected the images that were explained, got none"):
            replace(found, inputs={}).picture()
        with pytest.raises(ShapeError, match=re.escape("normalisation: expected (mean, std) of 3 channels")):
            found.picture(normalisation=([0.5, 0.5], [1.0, 1.0]))
        with pytest.raises(OptionError, match="annotation: expected images, tokens, labels, normalisation, got label"):
            found.annotation.with_(label="x")
        with pytest.raises(OptionError, match="side: expected a number of pixels from 16, got 4"):
            found.picture(side=4)
        with pytest.raises(NonFiniteError, match="map: expected finite numbers, got"):
            replace(found, relevance=found.relevance * float("nan")).picture()

    def test_without_matplotlib(self, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        found = relprop.explain(model, noise(1), target=1)
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(MissingDependencyError, match="pictures need matplotlib, which is not installed"):
            found.picture()
        assert found._repr_html_() is None


class Words(nn.Module):
    """A classifier of token ids whose answer is a sum over seen tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 3, bias=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        seen = attention_mask.unsqueeze(-1).to(self.embed.weight.dtype)
        return self.head((self.embed(input_ids) * seen).sum(1))


class Tokenizer:
    all_special_tokens = ("<pad>",)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"▁t{i}" if i else "<pad>" for i in ids]


class TestTexts:
    @pytest.fixture
    def found(self) -> relprop.Explanation:
        torch.manual_seed(0)
        ids = torch.tensor([[3, 1, 4, 1], [5, 2, 0, 0]])
        mask = (ids > 0).long()
        target = [[0, 2], [1, 2]]
        return relprop.explain(
            Words().eval(), input_ids=ids, attention_mask=mask, target=target, method="gradient_x_input"
        )

    def test_padding_is_left_out(self, found: relprop.Explanation) -> None:
        texts = passages(found.annotated(tokens=Tokenizer(), labels=("no", "maybe", "yes")))
        assert [(text.title, text.tokens) for text in texts] == [
            ("sample 0: no", ["▁t3", "▁t1", "▁t4", "▁t1"]),
            ("sample 0: yes", ["▁t3", "▁t1", "▁t4", "▁t1"]),
            ("sample 1: maybe", ["▁t5", "▁t2"]),
            ("sample 1: yes", ["▁t5", "▁t2"]),
        ]
        assert torch.equal(texts[3].relevance, found.relevance[1, 1, :2])  # type: ignore[arg-type]

    def test_tokens_by_list_by_id_and_wrong(self, found: relprop.Explanation) -> None:
        assert passages(found)[2].tokens == ["#5", "#2"]
        whole, seen = [["a", "b", "c", "d"], ["e", "f", "-", "-"]], [["a", "b", "c", "d"], ["e", "f"]]
        for given in (whole, seen):
            assert passages(found.annotated(tokens=given))[2].tokens == ["e", "f"]
        with pytest.raises(ShapeError, match="expected a number for each of 3 tokens, got 4"):
            found.html(tokens=[["a", "b", "c"], ["e", "f"]])

    def test_html_terminal_and_files(
        self, found: relprop.Explanation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        noted = found.annotated(tokens=Tokenizer())
        html = noted.html(samples=[1], scale="sample")
        assert html == text_html(passages(noted, [1]), scale="sample")
        assert noted._repr_html_() == noted.html()
        assert "t5" in noted.save(tmp_path / "a.html", theme="dark").read_text()
        noted.show(samples=[1])
        out = capsys.readouterr().out
        assert out.startswith("class 1\nt5 t2\n  strongest: ")
        with pytest.raises(OptionError, match="expected a name that ends in .html, got .png"):
            noted.save(tmp_path / "a.png")
        with pytest.raises(OptionError, match="expected something with a picture, got a text"):
            noted.picture()
        with pytest.raises(OptionError, match="over: expected 'targets' for a text, got 'heads'"):
            noted.html(over="heads")

    def test_compared(self, found: relprop.Explanation) -> None:
        html = compare({"one": found, "two": found}, tokens=Tokenizer(), samples=[0]).html()
        assert re.findall(r"<figcaption><span>(.*?)</span>", html) == [
            *("one: class 0", "one: class 2", "two: class 0", "two: class 2")
        ]
        image = relprop.explain(vit(), noise(2), target=1)
        both = replace(
            image,
            relevances={"pixels": image.relevance, "input_ids": found.relevances["input_ids"][:, 0]},
            inputs={**image.inputs, **found.inputs},
        )
        seen = compare({"one": both}, samples=[0])
        assert seen.picture is not None and "one: class 1" in seen.html()  # a map, and words below it
        with pytest.raises(OptionError, match="compare: expected explanations of images or of texts, got both"):
            compare({"text": found, "image": image})
