"""The commit of a model of the Hugging Face Hub that a run keeps to, from its first start on."""

from __future__ import annotations

from raymix.recipe import PretrainedModel, Recipe
from raymix.store.remote import files
from raymix.store.remote.hub import HubRepo, fetch_config, model_repo
from raymix.training.run.rundir import RunDirectory, stored_recipe


def pretrained_repo(model: PretrainedModel) -> HubRepo | None:
    """Return the repository of the Hub that a checkpoint is in; None for a directory."""
    return model_repo(model.path, model.commit or model.revision, "model.path")


def pin_model(recipe: Recipe, run: RunDirectory) -> Recipe:
    """Return the recipe with the commit of its model, where that is on the Hub.

    A run that has begun keeps its commit. Else it is that of the local cache, or what the Hub says:
    then `config.json` is downloaded, and no weights.

    Raises:
        StorageError: If neither the cache nor the Hub tells.
    """
    model = recipe.model
    repo = pretrained_repo(model) if isinstance(model, PretrainedModel) else None
    if repo is None or not isinstance(model, PretrainedModel) or model.commit is not None:
        return recipe
    commit = _stored_commit(run, model) or fetch_config(repo).parent.name
    return recipe.model_copy(update={"model": model.model_copy(update={"commit": commit})})


def _stored_commit(run: RunDirectory, model: PretrainedModel) -> str | None:
    if not files.exists(files.join(run.where, run.resolved.name)):
        return None
    stored = stored_recipe(run).model
    if not isinstance(stored, PretrainedModel):
        return None
    same = (stored.path, stored.revision) == (model.path, model.revision)
    return stored.commit if same else None
