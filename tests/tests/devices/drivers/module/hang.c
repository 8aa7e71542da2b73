// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * Its load is the last thing that happens in a guest: every processor spins with
 * interrupts off, so that nothing is scheduled and no timer fires any more.
 */
#include <linux/module.h>
#include <linux/processor.h>
#include <linux/smp.h>

static void spin(void *unused)
{
	local_irq_disable();
	for (;;)
		cpu_relax();
}

static int __init hang_init(void)
{
	on_each_cpu(spin, NULL, 0);
	return 0;
}
module_init(hang_init);

MODULE_DESCRIPTION("a guest that hangs, for tests");
MODULE_LICENSE("Dual MIT/GPL");
