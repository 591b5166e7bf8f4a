"""Reward models and critics: a transformers sequence-classification model with one label, which scores every token.

The score of an answer is read at its last real token, found from lengths, never from token ids: padding of either side
and with any token changes nothing. What is saved loads as `AutoModelForSequenceClassification`, with the mean and
standard deviation of its scores in config.json.
"""

import copy

import torch
from transformers import AutoModelForSequenceClassification

from .errors import InputError
from .models import disable_dropout, enable_checkpointing

NEW_PARAMETERS = ("score.weight",)  # what the folder of a causal language model lacks


class TokenScores:
    """Mixed into a sequence-classification class: its forward gives the score of every token, where that class picks
    one token by its id. The names of the parameters, and so the files, stay the same."""

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        """Float32 scores [B, T]: at t, of the text up to and including token t (of the state after it, to a critic).

        `attention_mask` and `position_ids` int64 [B, T] are needed where rows are padded on the left. What stands at
        padding is meaningless.
        """
        output = self.base_model(input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)
        return self.score(output.last_hidden_state).squeeze(-1).float()

    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self.score:
            # Stiennon et al. 2020: variance 1 / (d + 1), so that scores begin near 0 with a spread of about 1.
            torch.nn.init.normal_(module.weight, std=(module.in_features + 1) ** -0.5)


def build_reward_model(source, gradient_checkpointing=False):
    """The reward model of a Source, on meta and without dropout. Where its folder is of a causal language model, the
    engine initialises the `score` head (`engine.initialize(…, allow_missing=NEW_PARAMETERS)`).

    Raises InputError for a family that has no sequence-classification model with a head called `score`.
    """
    config = copy.deepcopy(source.config)
    config.num_labels = 1
    # Only for transformers' own forward, which looks for it: None makes it refuse batches rather than misread them.
    config.pad_token_id = source.tokenizer.pad_token_id
    try:
        family = AutoModelForSequenceClassification._model_mapping[type(config)]
    except KeyError:
        family = None
    if family is None:
        raise InputError(f"transformers has no sequence-classification model of type {config.model_type}")
    scored = type(family.__name__, (TokenScores, family), {})
    with torch.device("meta"):
        model = scored._from_config(config, dtype=torch.float32)
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise InputError(f"{family.__name__} has no linear head called 'score', so it cannot score every token")
    disable_dropout(model)
    if gradient_checkpointing:
        enable_checkpointing(model)
    return model


def last_token_scores(scores, mask):
    """The scores [B] at the last position of each row where `mask` [B, T] is true, whatever the side of the padding."""
    length = mask.shape[1]
    last = length - 1 - mask.flip(1).int().argmax(1)
    return scores.gather(1, last[:, None]).squeeze(1)


def set_normalization(config, mean, std):
    """Write the statistics of the scores into the model's configuration, which is saved with it."""
    config.mean, config.std = float(mean), float(std)


def forget_normalization(config):
    for name in ("mean", "std"):
        if hasattr(config, name):
            delattr(config, name)


def normalization(config):
    """(mean, std) of the scores. Raises InputError where the reward model was saved without them."""
    mean, std = getattr(config, "mean", None), getattr(config, "std", None)
    if mean is None or not std:
        raise InputError(
            "this reward model's config.json has no 'mean' and 'std' of its scores, so they cannot be normalised: "
            "train it with `megalith rm`, or turn it off with --normalize_reward false"
        )
    return mean, std


def normalized(scores, statistics):
    """(scores - mean) / std."""
    mean, std = statistics
    return (scores - mean) / std
