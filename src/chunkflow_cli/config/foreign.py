"""Map the configuration names of other tools to chunkflow's keys, or to the reason why none is needed.

They come from the documentation of TRL and the Hugging Face trainer, Axolotl, LLaMA-Factory, Unsloth, torchtune and
DeepSpeed. docs/coming-from.md has tables for readers.
"""

from __future__ import annotations

_PACKED = "not needed: chunkflow always packs short samples, and they never see each other"
_NO_PADDING = "not needed: chunkflow never pads"
_FOUND = "not needed: it is found from the model"
_BATCH = "set train.global_batch_size: the samples of an optimizer step, over all GPUs"
_LENGTH = "set data.max_length, with data.overlong=truncate to cut longer samples; chunk.size is not a length limit"
_LOGGER = "set log.backends, as in [jsonl,wandb]"
_QUANTISED = "set model.quantization=nf4 (4 bits, as QLoRA) or int8, with model.lora.enabled=true"
_EVALUATE = "set eval.every to a number of steps, and data.eval_path or data.eval_fraction"

FOREIGN = {
    # the model
    **dict.fromkeys(
        ("base_model", "model_name_or_path", "model_name", "model_id", "model", "pretrained_model_name_or_path",
         "checkpointer.checkpoint_dir", "model.name", "model.name_or_path", "model.id", "tokenizer", "tokenizer_path",
         "tokenizer_name", "tokenizer_name_or_path", "tokenizer_config"),
        "model.path",
    ),
    **dict.fromkeys(("model_type", "tokenizer_type", "is_llama_derived_model", "fan_in_fan_out"), _FOUND),
    **dict.fromkeys(("torch_dtype", "dtype", "precision", "mixed_precision"), "model.dtype"),
    **dict.fromkeys(("bf16", "bfloat16", "pure_bf16"), "set model.dtype=bfloat16, which is the default"),
    **dict.fromkeys(("fp16", "float16", "half"), "float16 is not supported: set model.dtype=bfloat16 or float32"),
    **dict.fromkeys(("fp32", "float32"), "set model.dtype=float32"),
    **dict.fromkeys(
        ("attn_implementation", "flash_attention", "flash_attn", "use_flash_attention_2", "sdp_attention",
         "xformers_attention", "sdpa_attention"),
        "model.attention",
    ),
    **dict.fromkeys(
        ("gradient_checkpointing", "use_gradient_checkpointing", "enable_activation_checkpointing",
         "recompute_activations"),
        "set model.activation_checkpointing=full or selective; chunks often make it unnecessary",
    ),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "quantization_bit", "quantization_method", "qlora",
                     "quantization"), _QUANTISED),
    **dict.fromkeys(("rope_scaling", "rope_parameters", "rope_theta"), "model.rope_scaling"),
    **dict.fromkeys(("resize_token_embeddings", "resize_token_embeddings_to_32x", "resize_vocab"), "model.vocab_size"),
    # adapters
    **dict.fromkeys(("adapter", "use_peft", "use_lora", "finetuning_type", "lora", "peft"),
                    "set model.lora.enabled=true to train LoRA adapters; false trains all weights"),
    **dict.fromkeys(("lora_r", "lora_rank", "peft_r", "rank"), "model.lora.r"),
    "lora_alpha": "model.lora.alpha",
    "lora_dropout": "model.lora.dropout",
    **dict.fromkeys(("lora_target_modules", "lora_target", "target_modules", "lora_attn_modules"),
                    "model.lora.target_modules"),
    "lora_target_linear": "set model.lora.target_modules=[all-linear], which is the default",
    **dict.fromkeys(("modules_to_save", "lora_modules_to_save", "additional_target"), "model.lora.modules_to_save"),
    **dict.fromkeys(("use_rslora", "peft_use_rslora", "lora_use_rslora"), "model.lora.use_rslora"),
    **dict.fromkeys(("use_dora", "peft_use_dora", "lora_use_dora"), "model.lora.use_dora"),
    **dict.fromkeys(("target_parameters", "lora_target_parameters"), "model.lora.target_parameters"),
    # the data
    **dict.fromkeys(
        ("dataset", "dataset_name", "dataset_path", "data", "data_path", "data_files", "train_file",
         "train_data", "training_data", "train_dataset", "dataset.source", "datasets.path", "data.name", "data.file",
         "data.files", "data.train", "data.train_path",
         "dataset_dir", "data_dir"),
        "data.path",
    ),
    **dict.fromkeys(("datasets", "dataset_mixer", "data_mixture"), "data.sources"),
    **dict.fromkeys(("interleave_probs", "interleave_prob", "mix_strategy", "probabilities", "sampling_ratio"),
                    "set data.sources, with a weight for each source"),
    **dict.fromkeys(("dedup", "deduplicate", "dataset_exact_deduplication"), "data.deduplicate"),
    **dict.fromkeys(("tokens_per_batch", "batch_tokens", "max_tokens_per_batch"), "train.global_batch_tokens"),
    **dict.fromkeys(("dataset_type", "dataset_format", "datasets.type", "data.type"), "data.format"),
    **dict.fromkeys(("test_file", "validation_file", "eval_file", "eval_data", "eval_dataset", "test_datasets",
                     "val_file", "dataset_test"), "data.eval_path"),
    **dict.fromkeys(("val_set_size", "val_size", "eval_split_ratio", "test_size", "validation_split"),
                    "data.eval_fraction"),
    **dict.fromkeys(
        ("max_length", "max_seq_length", "max_seq_len", "sequence_len", "sequence_length", "seq_length", "seq_len",
         "cutoff_len", "model_max_length", "block_size", "context_length", "train.max_length"),
        _LENGTH,
    ),
    **dict.fromkeys(("excess_length_strategy", "truncation", "truncation_mode"), "data.overlong"),
    **dict.fromkeys(("mask_history", "last_turn_only"), "set data.train_on=last"),
    **dict.fromkeys(("train_on_inputs", "train_on_prompt", "assistant_only_loss", "completion_only_loss",
                     "train_on_responses_only", "mask_inputs"),
                    "set data.train_on=assistant (the default) or all"),
    **dict.fromkeys(("dataset_prepared_path", "tokenized_path", "cache_path", "cache_dir"), "data.cache_dir"),
    **dict.fromkeys(("preprocessing_num_workers", "dataset_num_proc", "dataset_processes", "dataloader_num_workers",
                     "num_proc", "num_workers"), "data.num_workers"),
    **dict.fromkeys(("packing", "sample_packing", "neat_packing", "eval_packing", "eval_sample_packing",
                     "packing_strategy", "multipack_real_batches", "group_by_length", "flash_attn_packing"), _PACKED),
    **dict.fromkeys(("pad_to_sequence_len", "pad_to_multiple_of", "padding_free", "padding", "pad_token"), _NO_PADDING),
    **dict.fromkeys(("template", "chat_template", "chat_template_jinja", "chat_template_path", "conversation_template"),
                    "data.chat_template"),
    **dict.fromkeys(("chat_template_kwargs", "template_kwargs", "enable_thinking"),
                    "set data.template_arguments, as in {enable_thinking: false}"),
    **dict.fromkeys(("max_samples", "max_train_samples", "limit_train_samples"),
                    "set data.sources, with the number of samples of each: [{path: chats, samples: 1000}]"),
    "chunk_size": "chunk.size",
    # the optimizer
    **dict.fromkeys(("learning_rate", "lr", "max_lr", "peak_lr", "base_lr"), "optim.lr"),
    **dict.fromkeys(("optimizer", "optimizer_type", "optim.type", "optimizer.type", "optimizer_name"), "optim.name"),
    "weight_decay": "optim.weight_decay",
    **dict.fromkeys(("adam_beta1", "adam_beta2", "beta1", "beta2", "betas"), "set both: optim.betas=[0.9,0.999]"),
    **dict.fromkeys(("adam_epsilon", "epsilon", "adam_eps"), "optim.eps"),
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type", "scheduler", "schedule", "lr_schedule", "optim.scheduler"),
                    "optim.schedule"),
    **dict.fromkeys(("warmup_steps", "num_warmup_steps", "lr_warmup_steps", "warmup"),
                    "set optim.warmup_ratio, the fraction of the steps"),
    "warmup_ratio": "optim.warmup_ratio",
    **dict.fromkeys(("max_grad_norm", "gradient_clipping", "clip_grad", "clip_grad_norm", "gradient_clip_val",
                     "grad_clip"), "optim.grad_clip"),
    **dict.fromkeys(("min_lr", "min_lr_rate", "min_lr_ratio", "cosine_min_lr_ratio", "lr_min"),
                    "set optim.min_lr_ratio, the fraction of optim.lr"),
    **dict.fromkeys(("loraplus_lr_ratio", "loraplus_lr_embedding", "embedding_lr", "embedding_lr_scale",
                     "embedding_learning_rate", "lr_groups"),
                    "set optim.lr_factors, as in {lora_B: 16} or {embed_tokens: 0.1}"),
    **dict.fromkeys(("freeze", "frozen_parameters", "freeze_layers"), "optim.freeze"),
    **dict.fromkeys(("unfrozen_parameters", "freeze_trainable_layers", "freeze_trainable_modules",
                     "freeze_extra_modules"), "set optim.freeze, which names the weights that are not trained"),
    **dict.fromkeys(("neftune_noise_alpha", "noisy_embedding_alpha", "neftune"),
                    "noise in the embeddings is not supported: leave it out"),
    **dict.fromkeys(("use_liger_kernel", "use_liger", "enable_liger_kernel", "liger_rope", "liger_rms_norm",
                     "liger_glu_activation", "liger_swiglu"), "set model.kernels=liger"),
    **dict.fromkeys(("torch_compile", "use_torch_compile"), "model.compile"),
    # the run
    **dict.fromkeys(("num_epochs", "num_train_epochs", "n_epochs", "epochs", "max_epochs"), "train.epochs"),
    **dict.fromkeys(("max_steps", "num_steps", "total_steps", "train_steps", "max_train_steps", "train_iters",
                     "max_steps_per_epoch"), "train.steps"),
    **dict.fromkeys(("micro_batch_size", "per_device_train_batch_size", "per_gpu_train_batch_size", "batch_size",
                     "train_batch_size", "gradient_accumulation_steps", "grad_accum", "global_batch_size",
                     "train_micro_batch_size_per_gpu", "accumulate_grad_batches", "effective_batch_size",
                     "auto_find_batch_size", "eval_batch_size", "per_device_eval_batch_size"), _BATCH),
    **dict.fromkeys(("output_dir", "output", "save_dir", "output_path", "save_path", "logging_dir", "run_dir"),
                    "train.output_dir"),
    **dict.fromkeys(("overwrite_output_dir", "overwrite"), "set checkpoint.resume=never to move an old run aside"),
    **dict.fromkeys(("seed", "random_seed", "data_seed"), "train.seed"),
    **dict.fromkeys(("shuffle_dataset", "shuffle"), "train.shuffle"),
    **dict.fromkeys(("eval_steps", "evals_per_epoch", "eval_strategy", "evaluation_strategy", "do_eval",
                     "eval_every", "eval_interval"), _EVALUATE),
    **dict.fromkeys(("save_steps", "saves_per_epoch", "save_strategy", "save_every", "save_interval",
                     "checkpoint_every", "checkpointing_steps"), "checkpoint.every"),
    **dict.fromkeys(("save_total_limit", "save_limit", "keep_checkpoints"), "checkpoint.keep"),
    **dict.fromkeys(("resume_from_checkpoint", "auto_resume_from_checkpoints", "resume"), "checkpoint.resume"),
    **dict.fromkeys(("logging_steps", "log_every_n_steps", "logging_interval", "log_every", "log_interval"),
                    "log.every"),
    **dict.fromkeys(("report_to", "log_with", "wandb_run_id", "wandb_watch", "wandb_log_model", "use_wandb", "wandb",
                     "use_wandb_logging", "use_tensorboard", "use_mlflow", "use_trackio", "metric_logger"), _LOGGER),
    **dict.fromkeys(("wandb_entity", "wandb_mode", "mlflow_tracking_uri", "trackio_space_id"),
                    "set the environment variable of this name in capitals"),
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_strategy", "hub_token"),
                    "upload the finished model: chunkflow export RUN_DIR --push-to-hub REPO"),
    **dict.fromkeys(("early_stopping", "early_stopping_patience"), "eval.early_stopping_patience"),
    **dict.fromkeys(("load_best_model_at_end", "save_best_model", "keep_best"), "eval.keep_best"),
    **dict.fromkeys(("metric_for_best_model", "greater_is_better"),
                    "not needed: the lowest held-out loss is the best (eval.keep_best)"),
    "stage": "set train.task=sft (the default), dpo, orpo or kto",
    **dict.fromkeys(("run_name", "wandb_name", "wandb_run_name", "trackio_name"), "log.run_name"),
    **dict.fromkeys(("wandb_project", "mlflow_experiment_name", "project"), "log.project"),
    # processes
    **dict.fromkeys(("deepspeed", "deepspeed_config", "ds_config"),
                    "set engine.zero_stage, engine.offload, and for buffers engine.deepspeed"),
    **dict.fromkeys(("zero_stage", "zero", "engine.stage", "zero.stage", "zero_optimization.stage",
                     "zero_optimization"), "engine.zero_stage"),
    **dict.fromkeys(("fsdp", "fsdp_config", "fsdp_final_state_dict_type"),
                    "set engine.zero_stage=3, which divides the weights among the GPUs as FSDP does"),
    **dict.fromkeys(("cpu_offload", "offload", "offload_optimizer", "fsdp_cpu_offload"), "engine.offload"),
    **dict.fromkeys(("nproc_per_node", "num_processes", "num_gpus", "n_gpus", "world_size", "nproc", "gpus", "devices"),
                    "launch.processes"),
    **dict.fromkeys(("sequence_parallel_size", "sequence_parallel_degree", "context_parallel_size", "cp_size",
                     "ulysses_sequence_parallel_size", "context_parallel_degree"), "parallel.sequence"),
    **dict.fromkeys(("pipeline_parallel_size", "pipeline_model_parallel_size", "pp_size", "pipeline_stages",
                     "num_stages"), "parallel.pipeline"),
    **dict.fromkeys(("tensor_parallel_size", "tensor_model_parallel_size", "tp_size"),
                    "tensor parallelism is not supported; parallel.sequence and engine.zero_stage=3 save memory"),
    **dict.fromkeys(("local_rank", "ddp_timeout", "ddp_find_unused_parameters", "strict", "do_train",
                     "save_safetensors", "overwrite_cache",
                     "plot_loss"),
                    "not needed: leave it out"),
    # files
    **dict.fromkeys(("config", "config_file", "config_path", "recpie", "receipe", "recipie", "reciep"),
                    "did you mean recipe=NAME, or recipe=PATH of a YAML file?"),
}  # fmt: skip
"""Replacement for each name: a key, or a sentence."""


def foreign_name(name: str) -> str | None:
    """Return the replacement for another tool's name, which may have a section prefix; None if the name is unknown."""
    plain = name.lower().replace("-", "_")
    return FOREIGN.get(plain) or (FOREIGN.get(plain.rpartition(".")[2]) if "." in plain else None)
