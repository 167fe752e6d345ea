"""The ops: one file each, from public function down to kernel. ``reference.py`` holds their definitions."""
