"""Pre-training and fine-tuning: stages of training, strategies of transfer, and what a base forgets."""

from .learn import finetune, pretrain

__all__ = ["finetune", "pretrain"]
