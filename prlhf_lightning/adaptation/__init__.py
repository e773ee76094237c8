"""New users of a trained model: their rows from a handful of pairs, and which pairs to ask them next."""

from prlhf_lightning.adaptation.adapt import Adapted, adapt_users, trained_rows
from prlhf_lightning.adaptation.laplace import Posterior, laplace
from prlhf_lightning.adaptation.margins import Margins
from prlhf_lightning.adaptation.prior import UserPrior

__all__ = [
    "Adapted",
    "Margins",
    "Posterior",
    "UserPrior",
    "adapt_users",


    "laplace",

]
