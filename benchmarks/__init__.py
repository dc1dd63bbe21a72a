"""What can only be measured at full size: each file is a command, and says how long and how much memory it takes."""
