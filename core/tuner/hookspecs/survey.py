"""Before any weight is read: config, the model's facts, the data."""

# Specifications have docstrings and no bodies.
# mypy: disable-error-code="empty-body"
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from tuner.hookspecs.markers import hookspec

if TYPE_CHECKING:
    from tuner.blocks import TokenSelector
    from tuner.data.order import Order
    from tuner.data.samples import Prepared, Sample
    from tuner.data.source import Source
    from tuner.run import Run
    from tuner.spec import ModelSpec
    from tuner.train.optimizers import OptimizerChoice
    from tuner.workload import Workload


class SurveyHooks:
    """Before any weight is read: config, the model's facts, the data."""

    @hookspec
    def configure(self, run: Run) -> None:
        """Check what only the whole selection can tell.

        Called: all, after every config is valid and before any weight is read; also by ``tuner check``.
        Arguments: ``run``, without device and model spec.
        Returns: nothing; raises ConfigError to refuse.

        Example::

            @hookimpl
            def configure(self, run):
                if self.config.enable_model_cpu_offload and self.config.enable_group_offload:
                    raise ConfigError("enable_model_cpu_offload and enable_group_offload exclude each other")
        """

    @hookspec
    def propose_settings(self, run: Run) -> Mapping[str, Any]:
        """Set keys that the user did not set, for this run.

        Called: all, on the main process, once, after ``configure`` and before everything else; also by ``tuner check``,
        ``plan`` and ``cache``. The run is then assembled anew with the answers, so that plugins which they select are
        loaded; that assembly is not asked again.
        Arguments: ``run``, without device and model spec; ``run.explicit`` names the keys that the user set.
        Returns: key -> value, ``{}`` for none. A key that the user set, or that two plugins propose, is an error.
        Checkpoints say in their manifest what was ``proposed``: a plugin whose answer depends on the machine takes it
        from there when the run goes on.

        Example::

            @hookimpl
            def propose_settings(self, run):
                return {} if "vae_enable_tiling" in run.explicit else {"vae_enable_tiling": self.config.small_card}
        """

    @hookspec
    def optimizers(self, run: Run) -> Mapping[str, OptimizerChoice]:
        """Offer optimizers.

        Called: all, once, after ``configure``; also by ``tuner check``, so import no library here.
        Arguments: ``run``, without device and model spec.
        Returns: value of the key ``optimizer`` -> an OptimizerChoice (``tuner.train.optimizers``): where its class
        lives, what to install, and our defaults for it. A name offered twice is an error. The merged mapping is
        ``run.optimizers``.

        Example::

            @hookimpl
            def optimizers(self, run):
                from tuner.train.optimizers import OptimizerChoice
                return {"mine": OptimizerChoice("my_optimizers", "Mine", "my-optimizers", {"weight_decay": 0.01})}
        """

    @hookspec
    def lr_curves(self, run: Run) -> Mapping[str, Callable[[float], float]]:
        """Offer learning-rate curves.

        Called: all, once, after ``optimizers``; also by ``tuner check``.
        Arguments: ``run``, without device and model spec.
        Returns: value of the key ``lr_scheduler`` -> a function from the share of the steps after the warm-up that are
        over, 0 to 1, to a height: 1 is ``learning_rate``, 0 is ``lr_end``. A name offered twice is an error. The
        merged mapping is ``run.lr_curves``.

        Example::

            @hookimpl
            def lr_curves(self, run):
                return {"stairs": lambda share: 1 - int(4 * share) / 4}
        """

    @hookspec(firstresult=True)
    def describe_model(self, run: Run) -> ModelSpec:
        """Say what the model is, without weights and without torch.

        Called: one, before everything that needs dimensions: ``check``, buckets, data report, routes.
        Arguments: ``run``, without device and model spec.
        Returns: a ModelSpec, from the model's config.json or a table of flavours.

        Example::

            @hookimpl
            def describe_model(self, run):
                from my_family.describe import read_spec
                return read_spec(run.config.pretrained_model_name_or_path)
        """

    @hookspec
    def known_models(self, run: Run) -> Iterable[ModelSpec]:
        """Name the models that this plugin knows without being told where one is.

        Called: all, by commands on adapter files, when neither the file nor its user says which model it is for.
        Arguments: ``run``, without device and model spec, of a config that names the family alone.
        Returns: ModelSpecs whose networks have ``weights``, the usual model first; no torch, no download.

        Example::

            @hookimpl
            def known_models(self, run):
                from my_family.describe import FLAVOURS, spec_of
                return [spec_of(flavour) for flavour in FLAVOURS]
        """

    @hookspec
    def adapter_formats(self, run: Run) -> Mapping[str, Any]:
        """Offer formats of adapter files.

        Called: all, where an adapter file is read or written: by the commands on such files.
        Arguments: ``run``, without a config of its own there.
        Returns: name -> an AdapterFormat (``tuner.builtin.adapter_file``): whether a file is of this format by its
        keys, what it says of each module, and the way back. A name offered twice is an error. The last format that
        claims a file is taken.

        Example::

            @hookimpl
            def adapter_formats(self, run):
                from my_tool.format import MyFormat
                return {"mine": MyFormat()}
        """

    @hookspec
    def token_selectors(self, run: Run) -> Mapping[str, TokenSelector]:
        """Offer ways to choose which tokens a route keeps.

        Called: all, once, after ``describe_model``; also by ``tuner check``, so import torch in the selector's body.
        Arguments: ``run``.
        Returns: name -> a function ``(run, request, purpose) -> scores (B, S)``: a route keeps the tokens of the
        lowest scores. What is random in it comes from ``run.rng(purpose, position)``. A name offered twice is an
        error. The merged mapping is ``run.token_selectors``.

        Example::

            @hookimpl
            def token_selectors(self, run):
                return {"loudest": lambda run, request, purpose: -request.tokens.float().norm(dim=-1)}
        """

    @hookspec
    def check_model(self, run: Run, spec: ModelSpec) -> None:
        """Check this plugin's keys against the model's dimensions.

        Called: all, right after ``describe_model``; also by ``tuner check``.
        Arguments: ``run``; ``spec``, what ``describe_model`` answered.
        Returns: nothing; raises ConfigError to refuse.

        Example::

            @hookimpl
            def check_model(self, run, spec):
                check_routes(self.config.tread_config.routes, spec.networks[0].blocks)
        """

    @hookspec
    def data_sources(self, run: Run) -> Mapping[str, Source]:
        """Offer places that the files of a dataset may come from.

        Called: all, once, after ``describe_model``; also by ``tuner check``.
        Arguments: ``run``.
        Returns: value of an entry's ``type`` -> a Source (``tuner.data.source``): the keys that its entries have,
        and a function that lists their files, fetched where they are elsewhere. A name offered twice is an error.
        The merged mapping is ``run.data_sources``.

        Example::

            @hookimpl
            def data_sources(self, run):
                return {"archive": ArchiveSource()}
        """

    @hookspec(firstresult=True)
    def prepare_data(self, run: Run, spec: ModelSpec) -> Prepared:
        """Say what is trained on: samples with their files, captions, buckets and views.

        Called: one (the built-in ``datasets``), after the model is described and before any weight is read; also by
        ``tuner check``.
        Arguments: ``run``; ``spec``, what ``describe_model`` answered.
        Returns: a Prepared (``tuner.data.samples``). The same files and keys must give the same answer in every
        process and in every run.

        Example::

            @hookimpl
            def prepare_data(self, run, spec):
                from my_archive.prepare import prepare
                return prepare(self.config.archive, spec)
        """

    @hookspec(firstresult=True)
    def plan_epochs(self, run: Run, spec: ModelSpec, data: Prepared, processes: int) -> Order:
        """Say which samples each optimizer step trains on.

        Called: one (the built-in ``epochs``), after the data are prepared, also by ``tuner check``; and again after the
        cache is built, when files had to be left out because they could not be encoded.
        Arguments: ``run``; ``spec``; ``data``, what ``prepare_data`` answered; ``processes``, how many train.
        Returns: an Order (``tuner.data.order``): a pure function of seed and step.

        Example::

            @hookimpl
            def plan_epochs(self, run, spec, data, processes):
                from my_curriculum.order import EasyFirst
                return EasyFirst(data, run.config, processes)
        """

    @hookspec
    def data_ready(self, run: Run, spec: ModelSpec, data: Prepared, plan: Order) -> None:
        """Look at the data before any weight is read: warn, refuse, or write a report of it.

        Called: all, right after ``plan_epochs``, also by ``tuner check``; and again after the cache is built, when
        files had to be left out because they could not be encoded. Files are written by the main process only.
        Arguments: ``run``; ``spec``; ``data``, what ``prepare_data`` answered; ``plan``, what ``plan_epochs`` did.
        Returns: nothing; raises ConfigError or DataError to refuse.

        Example::

            @hookimpl
            def data_ready(self, run, spec, data, plan):
                if any(sample.companion("mask") for sample in data.samples):
                    run.log.warning("masks were found to do harm with this model")
        """

    @hookspec
    def extra_samples(self, run: Run, spec: ModelSpec, data: Prepared) -> Iterable[Sample]:
        """Name clips and pictures to encode beside the datasets' own, such as the first frames of validation clips.

        Called: all, after ``prepare_data`` and before ``data_ready``, also by ``tuner check``.
        Arguments: ``run``; ``spec``; ``data``, what ``prepare_data`` answered.
        Returns: Samples (``tuner.data.samples``) with ids of their own. They are never trained on; their encodings are
        at ``run.cached.video(sample)`` once the cache is built, and those that could not be encoded are missing from
        ``run.cached.prepared.extra``.

        Example::

            @hookimpl
            def extra_samples(self, run, spec, data):
                return [replace(data.samples[0], sample_id="my_plugin/first")]
        """

    @hookspec
    def estimate(self, run: Run, spec: ModelSpec, workload: Workload) -> Mapping[str, Any]:
        """Say what this plugin changes about the speed and the memory of a training step.

        Called: all, when a step's cost is asked for (``run.estimate``), also by ``tuner check`` and ``tuner plan``;
        any number of times, so compute from the config alone, without torch.
        Arguments: ``run``; ``spec``; ``workload``, of one network and one shape of clips, without any plugin.
        Returns: name of a field of Workload (``tuner.workload``) -> its value with this plugin; ``{}`` changes
        nothing. A field that two plugins answer for is an error.

        Example::

            @hookimpl
            def estimate(self, run, spec, workload):
                return {"feed_forward_tokens": 1024 * self.config.feed_forward_chunk_size}
        """
