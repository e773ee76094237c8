"""Preference losses: each maps log-probabilities of pairs to one loss per pair.

RPO is `DPOLoss` (or any other) with `sft_weight > 0`; conservative DPO is `DPOLoss` with `label_smoothing > 0`.
To add a loss, subclass `MarginLoss` or `UnpairedLoss` (one method each), or `PreferenceLoss`, in your own file. Select
it by `class_path`.

Losses of online RL are subclasses of `PolicyGradientLoss`: log-probabilities of sampled completions, and advantages.
"""

from prlhf_lightning.losses.advantages import (
    batch_scaled_advantages,
    centered_advantages,
    group_scaled_advantages,
    leave_one_out_advantages,
)
from prlhf_lightning.losses.base import MarginLoss, PreferenceLoss
from prlhf_lightning.losses.bradley_terry import BradleyTerryLoss
from prlhf_lightning.losses.grpo import (
    BNPOLoss,
    CISPOLoss,
    ClippedLoss,
    DAPOLoss,
    DrGRPOLoss,
    GRPOLoss,
    GSPOLoss,
    RLOOLoss,
)
from prlhf_lightning.losses.kl import kl_estimates
from prlhf_lightning.losses.length import overlong_penalty
from prlhf_lightning.losses.margin import (
    DiscoPOPLoss,
    DPOLoss,
    EXOLoss,
    HingeLoss,
    IPOLoss,
    RobustLoss,
    discopop_loss,
    dpo_loss,
    exo_loss,
    hinge_loss,
    ipo_loss,
    robust_loss,
)
from prlhf_lightning.losses.pointwise import (
    APODownLoss,
    APOZeroLoss,
    BCOLoss,
    NCALoss,
    SPPOLoss,
    apo_down_loss,
    apo_zero_loss,
    bco_loss,
    nca_loss,
    sppo_loss,
)
from prlhf_lightning.losses.policy_gradient import PolicyGradientLoss, PolicyGradientOutput, StepSizes
from prlhf_lightning.losses.reference_free import CPOLoss, ORPOLoss, SFTLoss, SimPOLoss, odds_ratio_loss, simpo_loss
from prlhf_lightning.losses.transport import AOTLoss, AOTUnpairedLoss
from prlhf_lightning.losses.unpaired import BCOUnpairedLoss, KTOLoss, UnpairedLoss, bco_unpaired_loss, kto_loss
from prlhf_lightning.losses.user_scale import UserScale, worst_served_weights

__all__ = [
    "AOTLoss",
    "AOTUnpairedLoss",
    "APODownLoss",
    "APOZeroLoss",
    "BCOLoss",
    "BCOUnpairedLoss",
    "BNPOLoss",
    "BradleyTerryLoss",
    "CISPOLoss",
    "CPOLoss",
    "ClippedLoss",
    "DAPOLoss",
    "DPOLoss",
    "DiscoPOPLoss",
    "DrGRPOLoss",
    "EXOLoss",
    "GRPOLoss",
    "GSPOLoss",
    "HingeLoss",
    "IPOLoss",
    "KTOLoss",
    "MarginLoss",
    "NCALoss",
    "ORPOLoss",
    "PolicyGradientLoss",
    "PolicyGradientOutput",
    "PreferenceLoss",
    "RLOOLoss",
    "RobustLoss",
    "SFTLoss",
    "SPPOLoss",
    "SimPOLoss",
    "StepSizes",
    "UnpairedLoss",
    "UserScale",
    "apo_down_loss",
    "apo_zero_loss",
    "batch_scaled_advantages",
    "bco_loss",
    "bco_unpaired_loss",
    "centered_advantages",
    "discopop_loss",
    "dpo_loss",
    "exo_loss",
    "group_scaled_advantages",
    "hinge_loss",
    "ipo_loss",
    "kl_estimates",
    "kto_loss",
    "leave_one_out_advantages",
    "nca_loss",
    "odds_ratio_loss",
    "overlong_penalty",
    "robust_loss",
    "simpo_loss",
    "sppo_loss",
    "worst_served_weights",
]
