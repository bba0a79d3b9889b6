"""What training minimizes: cross-entropy, and a loss that knows the order of counts."""

from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot


def training_loss(
    logits: Tensor, targets: Tensor, label_smoothing: float, ordinal_share: float
) -> Tensor:
    """The loss of each image, float32 [batch], for logits [batch, labels] and int64 targets.

    It is `ordinal_share` of ordinal_loss, and cross-entropy for the rest.
    """
    losses = cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    if not ordinal_share:
        return losses
    return losses.lerp(ordinal_loss(logits, targets, label_smoothing), ordinal_share)


def ordinal_loss(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """The squared earth mover's distance between prediction and truth, [batch].

    Labels are in the order of their counts: probability that is two labels off costs more than
    probability that is one off, to which cross-entropy is blind. Hou, Yu and Samaras, "Squared
    Earth Mover's Distance-based Loss for Training Deep Neural Networks", arXiv:1611.05916,
    equation 7 for l = 2.
    """
    labels = logits.shape[1]
    truth = one_hot(targets, labels) * (1 - label_smoothing) + label_smoothing / labels
    # A matrix product, because torch's cumulative sum is not deterministic on a GPU.
    cumulative = logits.new_ones(labels, labels).triu()
    return ((logits.softmax(1) - truth) @ cumulative).square().sum(1)
