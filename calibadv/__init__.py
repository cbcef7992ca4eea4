"""calibadv: train search agents with GRPO and CalibAdv, and compare them honestly."""
