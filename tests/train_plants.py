"""What is planted in a run's process before it begins: faults, real ones where they can be had."""
