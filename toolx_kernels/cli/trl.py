"""Names of TRL's settings that are not ours, so that none is taken for one of ours that is misspelt."""

# how some begin, and others
_GROUPS = tuple(
    """
    bnb_ dataloader_ dataset_ ddp_ deepspeed entropy_ fsdp gradient_accumulation_ hub_ liger_ load_ log_level
    logging_ lr_scheduler_ model_ per_device_ push_to_hub ref_model_ reward_model router_aux_ sapo_
    sync_ref_model torch_compile_ torch_dtype trackio_ trust_remote use_liger use_transformers_ use_vllm
    vespo_ vllm_ warmup_
    """.split()
)
_NAMES = """
    attn_implementation auto_find_batch_size bf16 bf16_full_eval cache_implementation cast_lm_head_to_fp32
    data_seed disable_dropout disable_tqdm eval_accumulation_steps eval_delay eval_strategy
    evaluation_strategy fp16 fp16_full_eval generation_batch_size generation_kwargs
    gradient_checkpointing_kwargs load_best_model_at_end log_unique_prompts lora_dropout lora_task_type
    mask_truncated_completions max_prompt_length multi_objective_aggregation num_completions_to_print
    num_generations_eval off_policy_mask_threshold optim_args overwrite_output_dir remove_unused_columns
    repetition_penalty report_to resume_from_checkpoint run_name save_only_model save_strategy shuffle_dataset
    steps_per_generation tf32 top_entropy_quantile use_adaptive_entropy use_bias_correction_kl use_cpu
    use_dora use_rslora
    """.split()
SEE = "it is TRL's, and docs/from-trl.md says what there is here."


def is_trls(name: str) -> bool:
    """Whether TRL has a setting ``name`` that we do not have, for example ``use_vllm``."""
    return name in _NAMES or name.startswith(_GROUPS)
