"""One job: train, test, write what came out; and the command that starts it."""
