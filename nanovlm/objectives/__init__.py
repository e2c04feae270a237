"""What a run learns: (model, batch, extras) -> sum of losses over trained tokens.

`train.py` divides by the number of trained tokens of the whole step, over all its micro-batches. `extras` lives as
long as the step, for what the next micro-batch, the optimizer step or the metrics need.
"""

from nanovlm.objectives.next_token import next_token

OBJECTIVES = {"next_token": next_token}
