"""The command `relprop`: explain images, show what is installed, list the methods.

Exit codes: 0 done; 1 an error, or some images could not be explained; 2 wrong usage; 130 interrupted; 141 the reader of
the output went away.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from relprop import __version__
from relprop.cli.explain import explain_images
from relprop.cli.models import names_a_file
from relprop.cli.report import explain_texts, report_images, report_texts
from relprop.errors import RelpropError
from relprop.info import describe_installation, describe_methods

__all__ = ["build_parser", "guarded", "main"]

_EXAMPLES = """\
examples:
  relprop explain photos/ --model vit_base_patch16_224 --target top:2
  relprop explain cat.jpg --model vit_base_patch16_224 --target "tabby" --method full --out maps
  relprop explain cat.jpg --model vit_base_patch16_224 --report cat.html
  relprop explain --text "Never dull." --model textattack/bert-base-uncased-SST-2 --method attnlrp
  relprop explain scan.png --model mine.safetensors --arch vit_tiny_patch16_224
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; wrong usage ends in SystemExit(2), as argparse does it."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.command == "explain":
        _check_usage(options.parser, options)
    return guarded(lambda: options.run(options), debug=options.debug)


def guarded(run: Callable[[], int], *, debug: bool = False) -> int:
    """Run a command; its errors become one line on stderr (with `debug` after a traceback) and an exit code."""
    try:
        code = run()
        sys.stdout.flush()
        return code
    except RelpropError as error:
        if debug:
            traceback.print_exc()
        print(f"relprop: error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):  # the interpreter flushes stdout once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        print("relprop: interrupted", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; parsed options have `run`, which takes them and returns an exit code."""
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="show a traceback with an error")
    parser = argparse.ArgumentParser(
        prog="relprop",
        description="Explain Transformers by relevance propagation.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"relprop {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    explain = commands.add_parser(
        "explain",
        parents=[debug],
        help="write pictures of what a model looked at",
        description="Explain images: for each image and class one PNG, the image as the model sees it beside its"
        " relevance. Prints file, class, probability and PNG, separated by tabs (with --check also the disagreement)."
        " With --text prints the text in colours; with --report writes one page about everything.",
    )
    explain.set_defaults(run=_explain, parser=explain)
    explain.add_argument("images", nargs="*", metavar="IMAGE", help="image files, or folders to search")
    explain.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="TEXT",
        help="a text in place of images, for a --model of transformers; may be given several times",
    )
    explain.add_argument(
        "--model",
        help="timm model name, or a .safetensors file with --arch (default: the bundled digits model); for --text a"
        " name or folder of transformers",
    )
    explain.add_argument("--arch", help="timm model name whose weights a --model file holds")
    explain.add_argument("--weights", type=Path, help="safetensors file to use in place of the model's own weights")
    explain.add_argument("--image-size", type=_positive, metavar="PIXELS", help="input size of a timm model (img_size)")
    explain.add_argument(
        "--target",
        metavar="LABEL|ID|top:K",
        help="class by name or number, or the K likeliest"
        " (default: top:1; of the digits model every digit with p > 0.5)",
    )
    explain.add_argument("--method", default="transformer_attribution", help="see `relprop methods`; %(default)s")
    explain.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option of the method, such as start_layer=1",
    )
    explain.add_argument("--composite", help="see `relprop methods` (default: the method's own)")
    explain.add_argument("--backend", default="auto", help="see `relprop info`; %(default)s")
    explain.add_argument("--device", default="cpu", help="of torch, such as cuda; %(default)s")
    explain.add_argument("--out", type=Path, help="folder of the PNGs; relprop-output")
    explain.add_argument(
        "--report",
        type=Path,
        metavar="PAGE.html",
        help="write one page instead: every method side by side, classes, timings, versions, the ledger of --method",
    )
    explain.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="images at once; %(default)s")
    explain.add_argument("--check", action="store_true", help="explain twice and say where an answer is not stable")

    info = commands.add_parser("info", parents=[debug], help="versions, machine, backends")
    info.set_defaults(run=lambda options: _show(describe_installation()))
    methods = commands.add_parser("methods", parents=[debug], help="table of methods and composites")
    methods.set_defaults(run=lambda options: _show(describe_methods(shutil.get_terminal_size((100, 24)).columns)))
    return parser


def _explain(options: argparse.Namespace) -> int:
    if options.text:
        return explain_texts(options) if options.report is None else report_texts(options)
    return explain_images(options) if options.report is None else report_images(options)


def _show(text: str) -> int:
    print(text)
    return 0


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return number


def _check_usage(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with a usage error where options do not go together."""
    if bool(options.images) == bool(options.text):
        parser.error(f"expected images or --text, got {'both' if options.text else 'neither'}")
    if options.text:
        given = {"--arch": options.arch, "--weights": options.weights, "--image-size": options.image_size}
        given.update({"--check": options.check or None, "--out": options.out})
        wrong = [name for name, value in given.items() if value is not None]
        if wrong:
            parser.error(f"{wrong[0]}: not together with --text")
        if options.model is None:
            parser.error("--text: expected the --model that reads it, a name or folder of transformers")
    if options.report is not None:
        if options.report.suffix.lower() not in (".html", ".htm"):
            parser.error(f"--report: expected a name that ends in .html, got {options.report}")
        if options.out is not None:
            parser.error("--out: not together with --report, which names the page itself")
        wrong = [f"--{name}" for name in ("option", "composite", "check") if getattr(options, name)]
        if wrong:
            parser.error(f"{wrong[0]}: not together with --report, which runs every method as it is")
    if options.text:
        return
    file = options.model is not None and names_a_file(options.model)
    if file and options.arch is None:
        parser.error(f"--model {options.model}: a file of weights needs --arch, the timm name of its architecture")
    if file and options.weights is not None:
        parser.error("--weights: not together with a --model that is a file of weights itself")
    if not file and options.arch is not None:
        parser.error("--arch: only together with a --model that is a file of weights")
    if options.model is None and options.image_size is not None:
        parser.error("--image-size: only together with --model; the digits model takes 64 x 64")
