"""relprop: relevance propagation for Transformers, compiled.

>>> import relprop
>>> from relprop.demo import bundled_scenes, load_model, preprocess
>>> model, images = load_model(), preprocess(bundled_scenes()["scene_3_7"].image[None])
>>> explanation = relprop.explain(model, images, target=7)
>>> explanation.relevance.shape  # [B, N], one value per token
torch.Size([1, 65])
"""

from relprop import compat, pictures
from relprop.backends import backends
from relprop.composites import Composite, Entry, composites, entry, find_composite, register_composite
from relprop.engine import Engine, compile, explain
from relprop.errors import RelpropError
from relprop.explanation import Explanation
from relprop.generation import Generation, explain_generation
from relprop.latents import Latent
from relprop.ledger import Ledger, LedgerEntry
from relprop.methods import methods
from relprop.native import empty_cache
from relprop.pipelines import pipeline
from relprop.program import Program
from relprop.rules import Call, Rule, Stabiliser, register_rule
from relprop.targets import contrast

__version__ = "0.1.0"

__all__ = [
    "Call",
    "Composite",
    "Engine",
    "Entry",
    "Explanation",
    "Generation",
    "Latent",
    "Ledger",
    "LedgerEntry",
    "Program",
    "RelpropError",
    "Rule",
    "Stabiliser",
    "backends",
    "compat",
    "compile",
    "composites",
    "contrast",
    "empty_cache",
    "entry",
    "explain",
    "explain_generation",
    "find_composite",
    "methods",
    "pictures",
    "pipeline",
    "register_composite",
    "register_rule",
]
