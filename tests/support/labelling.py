"""`make_labels` and `load_teacher` as the programmes call them: with the reader of all kinds of weights."""

from functools import partial

from pretrain import labelling
from wavlm_jax.loading import load_weights

make_labels = partial(labelling.make_labels, load=load_weights)
load_teacher = partial(labelling.load_teacher, load_weights)
