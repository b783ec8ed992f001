"""A teacher as train_distill.py uses it: teacher(batch) is what the student's forward pass computes
in its head, log-probs, entropies and the divergence from the teacher.

Shapes: N packed tokens, M of them with a target, K of the teacher's tokens, D and E widths of
student and teacher, V vocabulary.
"""

import torch

from nanopost import InputError, dist
from nanopost.batch import Batch
from nanopost.divergence import from_teacher


class Teacher:
    """A frozen model, of any size, over the student's vocabulary."""

    def __init__(self, model, vocabulary: int, dtype, temperature: float, beta: float, top_k: int):
        """vocabulary: of the student. dtype: of what computes. temperature, beta, top_k: see
        divergence.from_teacher. A collective."""
        self.model = model.requires_grad_(False)
        self.weight_VE = dist.full_tensor(model.head_weight).to(dtype)[:vocabulary]
        self.temperature, self.beta, self.top_k = temperature, beta, top_k
        if len(self.weight_VE) < vocabulary:
            raise InputError(
                f"the teacher {model.folder} has {len(self.weight_VE):,} tokens and the student "
                f"{vocabulary:,}: take a teacher that has as many, or more."
            )

    def __call__(self, batch: Batch):
        """-> head(hidden_MD, weight_VD) -> (logp_N, entropy_N, divergence_N), 0 where there is no
        target. A collective."""
        with torch.no_grad():
            teacher_hidden_ME = self.model(batch, head=lambda hidden_ME, weight_VE: hidden_ME)

        def head(hidden_MD, weight_VD):
            found_M = from_teacher(
                hidden_MD,
                weight_VD,
                batch.target_N[batch.at_M],
                self.temperature,
                teacher_hidden_ME,
                self.weight_VE,
                self.beta,
                self.top_k,
            )
            return tuple(map(batch.spread, found_M))

        return head
