"""Preference losses: each maps log-probabilities of pairs to one loss per pair.

RPO is `DPOLoss` (or any other) with `sft_weight > 0`; conservative DPO is `DPOLoss` with `label_smoothing > 0`.
To add a loss, subclass `MarginLoss` or `UnpairedLoss` (one method each), or `PreferenceLoss`, in your own file. Select
it by `class_path`.
"""

from prlhf_lightning.losses.base import MarginLoss, PreferenceLoss
from prlhf_lightning.losses.bradley_terry import BradleyTerryLoss
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
from prlhf_lightning.losses.reference_free import CPOLoss, ORPOLoss, SFTLoss, SimPOLoss, odds_ratio_loss, simpo_loss
from prlhf_lightning.losses.transport import AOTLoss, AOTUnpairedLoss
from prlhf_lightning.losses.unpaired import BCOUnpairedLoss, KTOLoss, UnpairedLoss, bco_unpaired_loss, kto_loss

__all__ = [
    "AOTLoss",
    "AOTUnpairedLoss",
    "APODownLoss",
    "APOZeroLoss",
    "BCOLoss",
    "BCOUnpairedLoss",
    "BradleyTerryLoss",
    "CPOLoss",
    "DPOLoss",
    "DiscoPOPLoss",
    "EXOLoss",
    "HingeLoss",
    "IPOLoss",
    "KTOLoss",
    "MarginLoss",
    "NCALoss",
    "ORPOLoss",
    "PreferenceLoss",
    "RobustLoss",
    "SFTLoss",
    "SPPOLoss",
    "SimPOLoss",
    "UnpairedLoss",
    "apo_down_loss",
    "apo_zero_loss",
    "bco_loss",
    "bco_unpaired_loss",
    "discopop_loss",
    "dpo_loss",
    "exo_loss",
    "hinge_loss",
    "ipo_loss",
    "kto_loss",
    "nca_loss",
    "odds_ratio_loss",
    "robust_loss",
    "simpo_loss",
    "sppo_loss",
]
