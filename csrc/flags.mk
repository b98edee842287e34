# The compiler's flags, for setup.py and for the Makefile beside this: NAME := flags, in one line.
BASE := -std=c++17 -Wall
# Sources named *_avx2.cpp, *_avx512.cpp and *_amx.cpp get these as well. Which of them runs is decided at run time.
AVX2 := -mavx2 -mbmi -mbmi2 -mlzcnt -mpclmul -mfma -mf16c
AVX512 := -mavx2 -mbmi -mbmi2 -mlzcnt -mpclmul -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512cd -mavx512vbmi -mavx512vbmi2 -mavx512vnni -mgfni -mvpclmulqdq -mprefer-vector-width=512
AMX := -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mamx-tile -mamx-bf16 -mprefer-vector-width=512
