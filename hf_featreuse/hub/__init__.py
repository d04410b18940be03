"""On the Hub: the model card and plot of a run, pushes while and after training, and pushing a folder again."""

from hf_featreuse.hub.card import build_model_card
from hf_featreuse.hub.folders import push_folder
from hf_featreuse.hub.hub_trainer import HubTrainer
from hf_featreuse.hub.run_card import PLOT_FILE

__all__ = ["PLOT_FILE", "HubTrainer", "build_model_card", "push_folder"]
