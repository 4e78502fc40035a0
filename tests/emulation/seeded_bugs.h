// Kernels with one mistake each, which the emulator must catch.
#pragma once
#include <map>
#include <string>

// Launches by name. Each takes two device arrays of 256 floats, in and out.
std::map<std::string, void (*)(const float*, float*)> seeded_bugs();
