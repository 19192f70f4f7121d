"""Relevance rules, one file each, in plain PyTorch: the definition of every method and the oracle of every backend.

Importing this package registers them all.
"""

from relprop.rules.activation_identity import ActivationIdentity
from relprop.rules.activation_slope import ActivationSlope
from relprop.rules.add_epsilon import AddEpsilon, AddIdentity
from relprop.rules.add_gamma import AddGamma
from relprop.rules.add_normalised import AddNormalised
from relprop.rules.add_positional import AddPositional
from relprop.rules.attention_composed import AttentionComposed
from relprop.rules.base import ANY, REGISTRY, Absorbed, Call, Relevances, Rule, make_rule, register_rule
from relprop.rules.embedding_sum import EmbeddingSum
from relprop.rules.fanout_epsilon import FanoutEpsilon
from relprop.rules.gradient import Gradient
from relprop.rules.linear_alpha_beta import LinearAlphaBeta
from relprop.rules.linear_epsilon import LinearEpsilon
from relprop.rules.linear_flat import LinearFlat
from relprop.rules.linear_gamma import LinearGamma
from relprop.rules.linear_rescaled import LinearRescaled
from relprop.rules.linear_z_box import LinearZBox
from relprop.rules.matmul_alpha_beta import MatmulAlphaBeta
from relprop.rules.matmul_half import MatmulHalf
from relprop.rules.modified_gradient import ModifiedGradient
from relprop.rules.movement_adjoint import MovementAdjoint
from relprop.rules.mul_detached_gate import MulDetachedGate
from relprop.rules.mul_half import MulHalf
from relprop.rules.mul_positional import MulPositional
from relprop.rules.norm_identity import NormIdentity
from relprop.rules.norm_sigma_constant import NormSigmaConstant
from relprop.rules.pool_epsilon import PoolEpsilon
from relprop.rules.select_epsilon import SelectEpsilon
from relprop.rules.softmax_detached import SoftmaxDetached
from relprop.rules.softmax_identity import SoftmaxIdentity
from relprop.rules.softmax_taylor import SoftmaxTaylor
from relprop.rules.stabiliser import EXACT, REFERENCE, Stabiliser

__all__ = [
    "ANY",
    "EXACT",
    "REFERENCE",
    "REGISTRY",
    "Absorbed",
    "ActivationIdentity",
    "ActivationSlope",
    "AddEpsilon",
    "AddGamma",
    "AddIdentity",
    "AddNormalised",
    "AddPositional",
    "AttentionComposed",
    "Call",
    "EmbeddingSum",
    "FanoutEpsilon",
    "Gradient",
    "LinearAlphaBeta",
    "LinearEpsilon",
    "LinearFlat",
    "LinearGamma",
    "LinearRescaled",
    "LinearZBox",
    "MatmulAlphaBeta",
    "MatmulHalf",
    "ModifiedGradient",
    "MovementAdjoint",
    "MulDetachedGate",
    "MulHalf",
    "MulPositional",
    "NormIdentity",
    "NormSigmaConstant",
    "PoolEpsilon",
    "Relevances",
    "Rule",
    "SelectEpsilon",
    "SoftmaxDetached",
    "SoftmaxIdentity",
    "SoftmaxTaylor",
    "Stabiliser",
    "make_rule",
    "register_rule",
]
