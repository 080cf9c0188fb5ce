"""What a user did wrong, said in one sentence."""


class InputError(ValueError):
    """A file, label, option or model that cannot be used; the message names the cause and the fix.

    The command line prints the message and exits with status 2; every other exception is a defect of ours.
    """
