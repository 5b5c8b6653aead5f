"""A Trainer whose batches are bins of documents, dealt alike to every rank."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, seed_worker

from hf_sft.arguments import DataArguments
from hf_sft.attention.protocol import sent_to
from hf_sft.attention.selfcheck import Choice
from hf_sft.collators import Batch, HostParts, LabelsCollator
from hf_sft.data.bins import BinLoader, Bins, BinSampler, Examples
from hf_sft.data.live import LazyBins, LiveRecords, StreamBins, is_stream
from hf_sft.data.pipeline import rows_from_examples
from hf_sft.metrics import sum_dtype
from hf_sft.models.vocabulary import vocabulary_rows
from hf_sft.models.wrappers import base_model
from hf_sft.objectives import Objective
from hf_sft.products import fast_products
from hf_sft.training.workers import outlive_termination

logger = logging.getLogger(__name__)

AnyBins = Bins | Examples | LazyBins | StreamBins


class BinTrainer(Trainer):
    """Data sets become bins, and loaders deal them; set the attributes below before ``Trainer.__init__`` runs.

    Attributes:
        data_args: lengths, packing, template and supervision.
        objective: what is learned, and how it is collated.
        layout: how documents are laid out.
        collects_logits: evaluation needs one document per row, for functions on logits.
        user_collator: a collator that replaces ours.
        embedding_rows: token ids must be smaller.
        _resumed_bins: (epoch, number): so many bins of that epoch were seen before the run went on with steps of another size.
    """

    _resumed_bins: tuple[int, int] | None = None
    data_args: DataArguments
    objective: Objective
    layout: Choice
    collects_logits: bool = False
    user_collator: Callable[[list[Any]], Batch] | None = None
    embedding_rows: int

    def _read_model(self, model: nn.Module, tokenizer: Any, args: Any) -> None:
        self._seed: int = args.seed if args.data_seed is None else args.data_seed
        self.embedding_rows = vocabulary_rows(base_model(model))
        self._pad = getattr(tokenizer, "pad_token_id", None) or 0
        backend = self.layout.backend
        self._host_part = None if backend is None else backend.host_part(base_model(model))

    def _bins(self, dataset: Any, tokenizer: Any, *, evaluation: bool = False) -> AnyBins:
        """``dataset`` as bins: packed where the layout allows it."""
        if isinstance(dataset, (Bins, Examples, LazyBins, StreamBins)):
            return dataset
        if isinstance(dataset, dict):
            raise ValueError(f"a data set is wanted, and this is a dict of {', '.join(dataset)}: choose one of them")
        if not evaluation and (self.data_args.is_live or isinstance(dataset, LiveRecords) or is_stream(dataset)):
            return self._live_bins(dataset, tokenizer)
        if self.user_collator is not None and isinstance(dataset[0], dict) and "input_ids" in dataset[0]:
            return Examples(dataset)
        rules = self.objective.row_rules(evaluation=evaluation)
        rows = rows_from_examples(dataset, tokenizer, data=self.data_args, rules=rules, seed=self._seed)
        packed = self.layout.backend is not None and not (evaluation and self.collects_logits)
        bins = Bins(rows, self.data_args.bin_capacity if packed else None, self.objective.columns)
        if bins.largest_id >= self.embedding_rows:
            raise ValueError(
                f"the data holds token id {bins.largest_id}, and the model has {self.embedding_rows} embedding rows: "
                "the tokenizer and the model do not belong together"
            )
        return Examples(rows) if self.user_collator is not None else bins

    def _live_bins(self, dataset: Any, tokenizer: Any) -> LazyBins | StreamBins:
        """Training data that are tokenised while the model trains."""
        if self.user_collator is not None:
            raise ValueError(
                "a data_collator of your own takes finished examples: leave out streaming or lazy_preprocess"
            )
        data = self.data_args
        if is_stream(dataset) and not data.streaming:
            logger.info("the training data have no length: they are read as a stream")
            data = replace(data, streaming=True, lazy_preprocess=False)
        if not isinstance(dataset, LiveRecords):
            rules = self.objective.row_rules(evaluation=False)
            dataset = LiveRecords.of_examples(dataset, tokenizer, data=data, rules=rules, seed=self._seed)
        capacity = data.bin_capacity if self.layout.backend is not None else None
        return (StreamBins if data.streaming else LazyBins)(dataset, capacity, self.embedding_rows)

    def _loader(
        self,
        dataset: Bins | Examples | LazyBins,
        batch_size: int,
        *,
        accumulation: int = 1,
        seed: int | None = None,
        evaluation: bool = False,
        resumed: tuple[int, int] | None = None,
    ) -> BinLoader:
        args = self.args
        start_epoch, start = resumed or (0, 0)
        sampler = BinSampler(
            len(dataset),
            batch_size,
            accumulation=accumulation,
            world=args.world_size,
            rank=args.process_index,
            seed=seed,
            lengths=dataset.fills if isinstance(dataset, Bins) else None,
            # Logits come back in the order of the data, and what fills up the last batch is cut off behind them.
            balanced=not (evaluation and self.collects_logits),
            start=start,
            start_epoch=start_epoch,
        )
        return self._bin_loader(dataset, evaluation=evaluation, batch_sampler=sampler)

    def _bin_loader(self, dataset: AnyBins, *, evaluation: bool, **how: Any) -> BinLoader:
        args = self.args
        packed = getattr(dataset, "capacity", None) is not None
        collator = self.objective.collator(packed, self._pad, evaluation=evaluation)
        if packed and self._host_part is not None:
            collator = HostParts(collator, self._host_part)
        if self.user_collator is not None:
            collator = LabelsCollator(self.user_collator, dataset[0, 0][0])
        workers = args.dataloader_num_workers
        return BinLoader(
            dataset,
            collate_fn=collator,
            num_workers=workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers and workers > 0,
            prefetch_factor=args.dataloader_prefetch_factor if workers else None,
            worker_init_fn=partial(_begin_worker, num_workers=workers, rank=args.process_index) if workers else None,
            **how,
        )

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """``Trainer.train``, with the products of :mod:`hf_sft.products`."""
        with fast_products():
            return super().train(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """``Trainer.evaluation_loop``, with the products of :mod:`hf_sft.products`."""
        with fast_products():
            return super().evaluation_loop(*args, **kwargs)

    def get_train_dataloader(self) -> BinLoader:
        """This rank's micro-batches; the order is drawn from (``data_seed`` or ``seed``, epoch)."""
        if self.train_dataset is None:
            raise ValueError("training needs a train_dataset")
        args = self.args
        if isinstance(self.train_dataset, StreamBins):
            share = self.train_dataset.dealt(self._train_batch_size, args.world_size, args.process_index)
            return self._bin_loader(share, evaluation=False, batch_size=None)
        seed = None if args.train_sampling_strategy == "sequential" else self._seed
        dataset = cast(Bins, self.train_dataset)
        steps = args.gradient_accumulation_steps
        return self._loader(dataset, self._train_batch_size, accumulation=steps, seed=seed, resumed=self._resumed_bins)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> BinLoader:
        """This rank's batches of ``eval_dataset`` (data, the name of one of several, or by default the Trainer's own)."""
        if isinstance(eval_dataset, str):
            eval_dataset = cast(dict[str, Any], self.eval_dataset)[eval_dataset]
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("evaluation needs an eval_dataset")
        bins = cast(Bins | Examples, self._bins(dataset, self.processing_class, evaluation=True))
        return self._loader(bins, self.args.eval_batch_size, evaluation=True)

    def get_test_dataloader(self, test_dataset: Any) -> BinLoader:
        """As for evaluation."""
        return self.get_eval_dataloader(test_dataset)

    def num_examples(self, dataloader: Any) -> int:
        """Documents, not bins."""
        if isinstance(dataloader.dataset, StreamBins):
            return 0  # not known
        return sum(len(item) for item in getattr(dataloader.dataset, "bins", ())) or len(dataloader.dataset)

    def _prepare_input(self, data: Any) -> Any:
        # DeepSpeed's cast of every float tensor to the engine's type would round the weights of the rows.
        device = self.args.device
        if isinstance(data, list):
            return data  # integers of the layout that backends read on the host
        if isinstance(data, Tensor):
            return data.to(device, sum_dtype(device) if data.dtype == torch.float64 else data.dtype, non_blocking=True)
        return super()._prepare_input(data)

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> Tensor | None:
        """[K + 1] N per kind, and the number of micro-batches with tokens: summed on the host, then over ranks."""
        if not batch_samples:
            return None
        items: Tensor = sum(batch["num_items"] for batch in batch_samples)
        items = torch.cat([items, items.new_tensor([sum(batch["num_tokens"] > 0 for batch in batch_samples)])])
        items = sent_to(items.to(sum_dtype(device)), device)
        return self.accelerator.reduce(items, "sum") if self.args.world_size > 1 else items


def _begin_worker(number: int, num_workers: int, rank: int) -> None:
    """Seeds of a loader's worker, which outlives a SIGTERM to the whole job as long as its process needs it for the last step."""
    seed_worker(number, num_workers, rank)
    outlive_termination()
