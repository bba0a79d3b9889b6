"""A classifier of our own, for networks of transformers that have none."""

from typing import Any

from torch import Tensor, nn


class BackboneClassifier(nn.Module):
    """A network of transformers that describes images, and a linear layer that scores the labels.

    Takes images [batch, 3, size, size] and returns scores [batch, labels]. No class of transformers
    has these two parts, so transformers.pipeline cannot load the model.
    """

    def __init__(self, backbone: Any, labels: int) -> None:
        super().__init__()
        config = backbone.config
        width = config.hidden_sizes[-1] if hasattr(config, "hidden_sizes") else config.hidden_size
        self.backbone = backbone
        self.classifier = nn.Linear(width, labels)
        self.has_class_token = any("cls_token" in name for name, _ in backbone.named_parameters())

    def forward(self, images: Tensor) -> Tensor:
        output = self.backbone(pixel_values=images)
        scores: Tensor = self.classifier(self._features(output))
        return scores

    def activation_checkpointing_enable(self) -> None:
        """As networks of transformers have it. Raises ValueError if the backbone lacks it."""
        self.backbone.activation_checkpointing_enable()

    def _features(self, output: Any) -> Tensor:
        """[batch, width]: the pooled output, or else the class token, or else the mean token."""
        pooled: Tensor | None = getattr(output, "pooler_output", None)
        if pooled is not None:
            return pooled.flatten(1)
        tokens: Tensor = output.last_hidden_state
        return tokens[:, 0] if self.has_class_token else tokens.mean(dim=1)
