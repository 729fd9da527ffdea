"""Traces on real guests of the soft backend, compared with the model step by step."""

from anykvm.explorer.replay.campaign import Campaign as Campaign
from anykvm.explorer.replay.campaign import replay_all as replay_all
from anykvm.explorer.replay.perform import Compared as Compared
from anykvm.explorer.replay.perform import Replay as Replay
from anykvm.explorer.replay.perform import replay as replay
from anykvm.explorer.replay.possible import why_not as why_not
