"""Private names of other libraries that this package uses, each with the reason; a test fails when one is gone."""

# What `ImmunizationTrainer` overrides of `transformers.Trainer`.
OVERRIDDEN = {
    "_get_train_sampler": "rows of all sides are drawn together, by the seed and the epoch alone",
    "_hp_search_setup": "a trial's settings are known only after the trial's model was made",
    "_inner_training_loop": "starting figures and choices come after model_init and before anything is trained",
    "_save": "a checkpoint is written whole or not at all, is loaded back, and gets its record",
    "_save_checkpoint": "a checkpoint that cannot be written whole is passed over",
    "_save_rng_state": "the state of the immunization is written with it, before all processes' files are listed",
    "_load_from_checkpoint": "the state of the immunization is read; weights load whole",
    "_load_best_model": "weights load whole; the record follows them",
    "_push_from_checkpoint": "what leaves the machine is chosen file by file",
}
# What is used as it is: where it is found, and the reason.
USED = {
    "transformers.Trainer._prepare_inputs": "features are measured on inputs placed as in the Trainer's own loops",
    "transformers.Trainer._get_output_dir": "a trial's checkpoints lie in a folder of their own",
    "transformers.Trainer._finish_current_push": "a push waits for the one before it",
    "transformers.PreTrainedModel._from_config": "a classifier is built with a backbone's class and dtype",
    "transformers.PreTrainedModel._no_split_modules": "what FSDP shards by default",
    "transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref": "models load whole, also under ZeRO 3",
    "transformers.PreTrainedConfig()._name_or_path": "the record names the base model",
    "accelerate.state.AcceleratorState._shared_state": "whether weights are sharded, before there is an accelerator",
    "accelerate.Accelerator(cpu=True)._optimizers": "whether the model was prepared for training yet",
    "accelerate.Accelerator(cpu=True).prepare_model(torch.nn.Linear(1, 1))._is_accelerate_prepared": "an evaluation "
    "before training leaves it on a model that is not wrapped yet",
    "datasets.Dataset.from_dict({})._fingerprint": "stored activations belong to these very rows",
    "torch.nn.Module()._modules": "a module's second name, which named_children() leaves out",
    "torch.nn.Module()._non_persistent_buffers_set": "buffers that no checkpoint holds",
    "torch.nn.modules.batchnorm._BatchNorm": "every kind of BatchNorm",
    "torch.nn.modules.dropout._DropoutNd": "every kind of dropout",
    "argparse.ArgumentParser()._actions": "options of a file of arguments are checked against those of the command",
}
