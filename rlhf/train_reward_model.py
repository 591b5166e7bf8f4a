"""`megalith.rlhf.train_rm` under the name that the original announcement gave it."""

from .train_rm import main

if __name__ == "__main__":
    main()
