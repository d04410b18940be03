"""The Hub: the model card and plot of a run, pushes during and after training, and pushing a folder again."""

from hf_featreuse.hub.card import build_model_card
from hf_featreuse.hub.folders import push_folder
from hf_featreuse.hub.pusher import Pusher
from hf_featreuse.hub.run_card import PLOT_FILE, RunSummary, write_run_card

__all__ = ["PLOT_FILE", "Pusher", "RunSummary", "build_model_card", "push_folder", "write_run_card"]
