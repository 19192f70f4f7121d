"""Relevance as pictures: heat maps over images, coloured texts, matrices of tokens, the ledger, reports.

Pictures are PIL images and need matplotlib (`pip install relprop[images]`); HTML and terminal texts need nothing.
"""

from relprop.pictures.explanations import compare
from relprop.pictures.figures import require
from relprop.pictures.images import colour_bar, enlarge, normalise, overlay
from relprop.pictures.ledger import conditioning_picture, ledger_picture
from relprop.pictures.matrix import matrix_html, token_matrix
from relprop.pictures.panels import panel, save_png
from relprop.pictures.text import Passage, colour_depth, text_html, text_terminal
from relprop.pictures.view import View

__all__ = [
    "Passage",
    "View",
    "colour_bar",
    "colour_depth",
    "compare",
    "conditioning_picture",
    "enlarge",
    "ledger_picture",
    "matrix_html",
    "normalise",
    "overlay",
    "panel",
    "require",
    "save_png",
    "text_html",
    "text_terminal",
    "token_matrix",
]
