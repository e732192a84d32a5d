"""Every file of MMRole-Data: what it may contain, how it is read, checked and written."""
