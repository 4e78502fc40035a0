// Kernels of one warp that each call one function, for test_warp_functions.py. They take a, b and result in device
// memory.
#pragma once
#include <map>
#include <string>

std::map<std::string, void (*)(const void*, const void*, void*)> warp_function_tests();
