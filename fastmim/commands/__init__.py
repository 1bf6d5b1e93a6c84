"""The subcommands of ``fastmim`` beside ``pretrain``, and how the command line is read and answered."""
