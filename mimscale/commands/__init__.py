"""What the ``mimscale`` command and the launchers do: arguments in, words out."""
