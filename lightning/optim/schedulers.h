// All schedules.
#pragma once

#include "lightning/optim/combined_schedulers.h"
#include "lightning/optim/cyclic_schedulers.h"
#include "lightning/optim/decay_schedulers.h"
#include "lightning/optim/reduce_lr_on_plateau.h"
#include "lightning/optim/torch_scheduler.h"
