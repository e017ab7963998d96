"""What a training process imports, without starting a thread or touching a file."""

import hydra
import lightning
import mlflow
import mlflow.store.tracking.sqlalchemy_store
import peft
import torch
import transformers

import msgrpo_lab.callbacks.fit

__all__ = ["hydra", "lightning", "mlflow", "msgrpo_lab", "peft", "torch", "transformers"]
