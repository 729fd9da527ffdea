/* See python_flag.c. */
#ifndef PYTHON_FLAG_H
#define PYTHON_FLAG_H

const int *python_signals_flag(void);

#endif
