"""One train and one test for every task: runner, loops, launcher, sharding, optimizer, saving, resuming."""
